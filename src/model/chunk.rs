use chrono::FixedOffset;

use super::SeriesType;

/// A chunk holds at most this many samples: large enough that the row's own cost vanishes, small enough that one
/// value can be read without unpacking a day.
pub const MAX_CHUNK_SAMPLES: usize = 20_000;

const DAY_MS: i64 = 86_400_000;

/// The samples of one series of one record.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleSet {
    /// What was measured.
    pub series: SeriesType,
    /// Whole-period totals (a day's steps) as opposed to instants.
    pub total: bool,
    /// Offset of local time, where known.
    pub utc_offset: Option<FixedOffset>,
    /// (milliseconds since 1970 UTC, value).
    pub samples: Vec<(i64, f64)>,
}

/// A run of samples as it is stored: sorted, no two at one instant, inside one UTC day, one offset.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// What was measured.
    pub series: SeriesType,
    /// Whole-period totals as opposed to instants.
    pub total: bool,
    /// Offset of local time, where known.
    pub utc_offset: Option<FixedOffset>,
    /// First instant, milliseconds.
    pub first_at: i64,
    /// Last instant, milliseconds.
    pub last_at: i64,
    /// Distance of each sample from the one before it, milliseconds; the first is 0.
    pub deltas: Vec<i32>,
    /// The values.
    pub values: Vec<f64>,
}

impl Chunk {
    /// Smallest value.
    #[must_use]
    pub fn min(&self) -> f64 {
        self.values.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// Largest value.
    #[must_use]
    pub fn max(&self) -> f64 {
        self.values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// Sum of the values.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.values.iter().sum()
    }

    /// A digest of everything in it: two chunks with one digest need no second write.
    #[must_use]
    pub fn hash(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.values.len() * 12 + 32);
        bytes.extend_from_slice(&self.series.id.to_le_bytes());
        bytes.push(u8::from(self.total));
        bytes.extend_from_slice(&self.utc_offset.map_or(i32::MIN, |o| o.local_minus_utc()).to_le_bytes());
        bytes.extend_from_slice(&self.first_at.to_le_bytes());
        for delta in &self.deltas {
            bytes.extend_from_slice(&delta.to_le_bytes());
        }
        for value in &self.values {
            bytes.extend_from_slice(&value.to_bits().to_le_bytes());
        }
        blake3::hash(&bytes).as_bytes()[..16].to_vec()
    }
}

/// Cuts a set into chunks. Samples are sorted; of several at one instant the last one given wins.
#[must_use]
pub fn chunks(set: SampleSet) -> Vec<Chunk> {
    let SampleSet { series, total, utc_offset, mut samples } = set;
    // Providers send series in order nearly always; a stable sort of sorted input is one pass.
    samples.sort_by_key(|(at, _)| *at);
    let mut out: Vec<Chunk> = Vec::new();
    for (at, value) in samples {
        if let Some(chunk) = out.last_mut() {
            if at == chunk.last_at {
                if let Some(last) = chunk.values.last_mut() {
                    *last = value;
                }
                continue;
            }
            let same_day = at.div_euclid(DAY_MS) == chunk.first_at.div_euclid(DAY_MS);
            if same_day && chunk.values.len() < MAX_CHUNK_SAMPLES {
                // Inside one day the distance fits: 86 400 000 < 2^31.
                chunk.deltas.push(i32::try_from(at - chunk.last_at).unwrap_or(i32::MAX));
                chunk.values.push(value);
                chunk.last_at = at;
                continue;
            }
        }
        out.push(Chunk { series, total, utc_offset, first_at: at, last_at: at, deltas: vec![0], values: vec![value] });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::series;
    use super::*;

    fn set(samples: Vec<(i64, f64)>) -> SampleSet {
        SampleSet { series: series::HEART_RATE, total: false, utc_offset: None, samples }
    }

    #[test]
    fn sorts_drops_repeats_and_splits_at_utc_midnight() {
        let cut = chunks(set(vec![(DAY_MS + 5, 3.0), (10, 1.0), (10, 2.0), (DAY_MS - 1, 9.0)]));
        assert_eq!(cut.len(), 2);
        assert_eq!(cut[0].deltas, vec![0, (DAY_MS - 11) as i32]);
        assert_eq!(cut[0].values, vec![2.0, 9.0]);
        assert_eq!((cut[1].first_at, cut[1].last_at), (DAY_MS + 5, DAY_MS + 5));
    }

    #[test]
    fn splits_before_it_grows_too_long() {
        let many = (0..MAX_CHUNK_SAMPLES as i64 + 1).map(|i| (i * 1000, i as f64)).collect();
        let cut = chunks(set(many));
        assert_eq!(cut.iter().map(|c| c.values.len()).collect::<Vec<_>>(), vec![MAX_CHUNK_SAMPLES, 1]);
    }

    #[test]
    fn days_before_1970_split_at_midnight_too() {
        assert_eq!(chunks(set(vec![(-1, 1.0), (0, 2.0)])).len(), 2);
    }

    #[test]
    fn the_digest_sees_every_field() {
        let base = chunks(set(vec![(0, 1.0), (1000, 2.0)])).remove(0);
        let mut other = base.clone();
        other.values[1] = 2.5;
        assert_ne!(base.hash(), other.hash());
        let mut other = base.clone();
        other.utc_offset = FixedOffset::east_opt(3600);
        assert_ne!(base.hash(), other.hash());
    }
}
