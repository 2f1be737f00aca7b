//! `wearsync init`: asks for what is needed and writes it down.

use std::fs::OpenOptions;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context as _;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;
use url::Url;

use super::Session;
use super::exit::{Exit, Outcome, usage};
use super::output::{facts, remark};
use crate::providers::{self, ProviderSpec};

/// Where a person is sent after agreeing: nothing listens there, but the address holds the code.
const REDIRECT: &str = "http://localhost/exchange_token";

/// What was answered.
struct Answers {
    data_dir: String,
    spec: &'static ProviderSpec,
    client_id: String,
    client_secret: SecretString,
    grant: Option<(&'static str, SecretString)>,
}

pub(crate) async fn run(session: &Session) -> Outcome {
    let path = session.file.clone().unwrap_or_else(|| PathBuf::from("wearsync.toml"));
    if path.exists() {
        return Err(usage(format!(
            "{} exists already and is left as it is: edit it, move it away, or name another file with --config",
            path.display()
        )));
    }
    let asking = tokio::task::spawn_blocking(ask);
    let answers = tokio::select! {
        answers = asking => answers??,
        _ = tokio::signal::ctrl_c() => {
            echo(true);
            remark("\nnothing was written");
            return Ok(Exit::Failed);
        }
    };
    write_new(&path, &settings(&answers))?;
    let next = match (&session.file, &answers.grant) {
        (None, Some(_)) => format!("wearsync sync {}", answers.spec.name),
        (Some(file), Some(_)) => format!("wearsync --config {} sync {}", file.display(), answers.spec.name),
        (None, None) => format!("wearsync connect {}", answers.spec.name),
        (Some(file), None) => format!("wearsync --config {} connect {}", file.display(), answers.spec.name),
    };
    session.out.show(&json!({ "written": path, "next": next }), || {
        let written = format!("{} (readable by you alone; it holds secrets: commit it nowhere)", path.display());
        facts(&[("written", Some(written)), ("next", Some(next.clone()))])
    })?;
    Ok(Exit::Done)
}

fn ask() -> anyhow::Result<Answers> {
    let data_dir = question("Folder for database and files", Some("./data"))?;
    let spec = loop {
        let known: Vec<&str> = providers::names().map(|name| name.0).collect();
        let name = question("Provider", known.first().copied())?.to_lowercase();
        if let Some(provider) = providers::find(&name) {
            break provider.spec();
        }
        remark(&format!("`{name}` is no provider; known are {}", known.join(", ")));
    };
    let title = spec.title;
    remark(&format!(
        "Your application at {title} has an id and a secret (Strava: https://www.strava.com/settings/api)."
    ));
    let client_id = required("Client id", || question("Client id", None))?;
    let client_secret = SecretString::from(required("Client secret", || hidden("Client secret"))?);
    let token = hidden("Refresh token (Enter if you have none)")?;
    let grant = if token.is_empty() {
        remark(&format!("Then open this address and agree:\n\n  {}\n", consent_address(spec, &client_id)?));
        remark("The page it leads to cannot be shown; its address holds the code.");
        let code = code_of(&hidden("That address, or the code alone (Enter to do it later)")?);
        (!code.is_empty()).then(|| ("authorization_code", SecretString::from(code)))
    } else {
        Some(("refresh_token", SecretString::from(token)))
    };
    Ok(Answers { data_dir, spec, client_id, client_secret, grant })
}

/// Asks until something is answered.
fn required(what: &str, mut asked: impl FnMut() -> anyhow::Result<String>) -> anyhow::Result<String> {
    loop {
        let answer = asked()?;
        if !answer.is_empty() {
            return Ok(answer);
        }
        remark(&format!("{what} is needed; Ctrl-C ends without writing anything"));
    }
}

/// One line from stdin; Enter alone is the default, where there is one.
fn question(text: &str, default: Option<&str>) -> anyhow::Result<String> {
    let mut err = io::stderr().lock();
    match default {
        Some(default) => write!(err, "{text} [{default}]: ")?,
        None => write!(err, "{text}: ")?,
    }
    err.flush()?;
    let mut line = String::new();
    if io::stdin().lock().read_line(&mut line)? == 0 {
        return Err(usage("the answers ended before the questions: nothing was written"));
    }
    let line = line.trim();
    Ok(if line.is_empty() { default.unwrap_or_default().to_owned() } else { line.to_owned() })
}

/// As [`question`], with what is typed not shown.
pub(crate) fn hidden(text: &str) -> anyhow::Result<String> {
    let off = io::stdin().is_terminal() && echo(false);
    let answer = question(text, None);
    if off {
        echo(true);
        remark("");
    }
    answer
}

/// Whether the terminal shows what is typed; `false`: it cannot be changed here.
fn echo(on: bool) -> bool {
    let word = if on { "echo" } else { "-echo" };
    Command::new("stty").arg(word).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Where a person agrees.
fn consent_address(spec: &ProviderSpec, client_id: &str) -> anyhow::Result<Url> {
    let oauth = spec.oauth.as_ref().with_context(|| format!("{} has no consent page", spec.title))?;
    let scopes: Vec<&str> = oauth.scopes.iter().map(|scope| scope.name).collect();
    let mut url = Url::parse(oauth.authorize_url)?;
    url.query_pairs_mut()
        .append_pair("client_id", client_id)
        .append_pair("redirect_uri", REDIRECT)
        .append_pair("response_type", "code")
        .append_pair("scope", &scopes.join(oauth.scope_separator));
    Ok(url)
}

/// The code in the address that a provider led to, or the text itself.
fn code_of(text: &str) -> String {
    let code = Url::parse(text)
        .ok()
        .and_then(|url| url.query_pairs().find(|(name, _)| name == "code").map(|(_, code)| code.into_owned()));
    code.unwrap_or_else(|| text.to_owned())
}

/// The answers as a settings file.
fn settings(answers: &Answers) -> SecretString {
    // A JSON string is a TOML string.
    let quoted = |text: &str| json!(text).to_string();
    let mut text = format!(
        "# Settings of wearsync; every one there is, with its default, is in config.default.toml of the sources.\n\
        data_dir = {}\n\n[providers.{}]\nclient_id = {}\nclient_secret = {}\n",
        quoted(&answers.data_dir),
        answers.spec.name,
        quoted(&answers.client_id),
        quoted(answers.client_secret.expose_secret()),
    );
    if let Some((name, grant)) = &answers.grant {
        text.push_str("# Taken in once; the provider replaces it, and the newer one is kept in the database.\n");
        text.push_str(&format!("{name} = {}\n", quoted(grant.expose_secret())));
    }
    SecretString::from(text)
}

/// Writes a file that was not there and that nobody else can read.
fn write_new(path: &Path, text: &SecretString) -> anyhow::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(path).and_then(|mut file| {
        file.write_all(text.expose_secret().as_bytes())?;
        file.sync_all()
    });
    written.with_context(|| format!("{} cannot be written", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn what_is_written_is_read_again_and_never_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wearsync.toml");
        let answers = Answers {
            data_dir: "./my \"data\"\\here".to_owned(),
            spec: providers::find("strava").unwrap().spec(),
            client_id: "90417".to_owned(),
            client_secret: SecretString::from("s3cr\"et".to_owned()),
            grant: Some(("refresh_token", SecretString::from("token".to_owned()))),
        };
        write_new(&path, &settings(&answers)).unwrap();
        let config = Config::load(Some(&path), []).unwrap();
        let strava = config.provider("strava");
        assert_eq!(config.data_dir, Path::new("./my \"data\"\\here"));
        assert_eq!(strava.client_secret.unwrap().expose_secret(), "s3cr\"et");
        assert_eq!(strava.refresh_token.unwrap().expose_secret(), "token");
        assert!(config.warnings.is_empty() && strava.authorization_code.is_none());
        assert!(write_new(&path, &settings(&answers)).is_err());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn codes_are_found_in_the_address() {
        assert_eq!(code_of("http://localhost/exchange_token?state=&code=a%2Bb&scope=read"), "a+b");
        assert_eq!(code_of("abc123"), "abc123");
        assert_eq!(code_of(""), "");
        let spec = providers::find("strava").unwrap().spec();
        let address = consent_address(spec, "9&0").unwrap();
        assert!(
            address.as_str().starts_with("https://www.strava.com/oauth/authorize?client_id=9%260&redirect_uri=http%3A")
        );
    }
}
