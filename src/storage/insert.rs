//! Many rows in one statement: an array for each column in Postgres, a list of values in SQLite. Which one an [`Insert`]
//! becomes is decided by the connection that writes it.

use sqlx::error::BoxDynError;
use sqlx::{Arguments as _, Database, Encode, PgConnection, Postgres, Sqlite, SqliteConnection, Type};

use super::Result;
use super::db::is_kept;

/// Rows of one table, column by column.
pub(super) struct Insert<'q, DB: Database> {
    table: &'static str,
    rows: usize,
    /// Names of the columns, and their types in Postgres.
    columns: Vec<(&'static str, &'static str)>,
    arguments: DB::Arguments<'q>,
    /// SQLite: each adds the next value of its column.
    values: Vec<Next<'q, DB::Arguments<'q>>>,
    error: Option<BoxDynError>,
}

type Next<'q, Arguments> = Box<dyn FnMut(&mut Arguments) -> Result<(), BoxDynError> + Send + 'q>;

impl<'q, DB: Database> Insert<'q, DB> {
    pub(super) fn into(table: &'static str, rows: usize) -> Self {
        let arguments = Default::default();
        Self { table, rows, columns: Vec::new(), arguments, values: Vec::new(), error: None }
    }

    fn finish(self, source: &str, conflict: &str) -> Result<(String, DB::Arguments<'q>)> {
        if let Some(error) = self.error {
            return Err(sqlx::Error::Encode(error).into());
        }
        let names: Vec<&str> = self.columns.iter().map(|(name, _)| *name).collect();
        Ok((format!("insert into {} ({}) {source} {conflict}", self.table, names.join(", ")), self.arguments))
    }
}

/// Takes a column whose values are of type `T`.
pub(super) trait Column<'q, T> {
    /// `kind` is the type of the column in Postgres.
    fn column(self, name: &'static str, kind: &'static str, values: impl Iterator<Item = T> + Send + 'q) -> Self;
}

impl<'q, T> Column<'q, T> for Insert<'q, Postgres>
where
    Vec<T>: Encode<'q, Postgres> + Type<Postgres> + 'q,
{
    fn column(mut self, name: &'static str, kind: &'static str, values: impl Iterator<Item = T> + Send + 'q) -> Self {
        self.columns.push((name, kind));
        if let Err(error) = self.arguments.add(values.collect::<Vec<T>>()) {
            self.error.get_or_insert(error);
        }
        self
    }
}

impl<'q, T> Column<'q, T> for Insert<'q, Sqlite>
where
    T: Encode<'q, Sqlite> + Type<Sqlite> + 'q,
{
    fn column(
        mut self,
        name: &'static str,
        kind: &'static str,
        mut values: impl Iterator<Item = T> + Send + 'q,
    ) -> Self {
        self.columns.push((name, kind));
        self.values.push(Box::new(move |arguments| values.next().map_or(Ok(()), |value| arguments.add(value))));
        self
    }
}

/// Writes the rows; `conflict` stands behind them.
pub(super) trait Write<C> {
    async fn write(self, connection: C, conflict: &str) -> Result<()>;
}

impl Write<&mut PgConnection> for Insert<'_, Postgres> {
    async fn write(self, connection: &mut PgConnection, conflict: &str) -> Result<()> {
        let arrays: Vec<_> = self.columns.iter().zip(1..).map(|((_, kind), n)| format!("${n}::{kind}[]")).collect();
        let (sql, arguments) = self.finish(&format!("select * from unnest({})", arrays.join(", ")), conflict)?;
        sqlx::query_with(&sql, arguments).execute(connection).await?;
        Ok(())
    }
}

impl Write<&mut SqliteConnection> for Insert<'_, Sqlite> {
    async fn write(mut self, connection: &mut SqliteConnection, conflict: &str) -> Result<()> {
        for _ in 0..self.rows {
            for add in &mut self.values {
                if let Err(error) = add(&mut self.arguments) {
                    self.error.get_or_insert(error);
                }
            }
        }
        let row = format!("({})", vec!["?"; self.columns.len()].join(", "));
        let source = format!("values {}", vec![row.as_str(); self.rows].join(", "));
        let kept = is_kept(self.rows);
        let (sql, arguments) = self.finish(&source, conflict)?;
        sqlx::query_with(&sql, arguments).persistent(kept).execute(connection).await?;
        Ok(())
    }
}
