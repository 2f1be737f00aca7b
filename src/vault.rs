//! Encryption at rest: what may be read back goes through [`Vault::seal`], what we hand out and want back unchanged
//! through [`Vault::sign`], what need only be recognised through [`hash_secret`], and what people chose themselves through
//! [`hash_password`].
//!
//! May name model and config. What must always hold: a sealed value opens only under the purpose and owner it was
//! sealed for; no key, plain value or part of one appears in an error, a log or a `Debug` line; a key file that others
//! can read is refused.
//!
//! Sealed bytes: key id (4 bytes, the start of the key's SHA-256) ‖ nonce (24 bytes, random) ‖ XChaCha20-Poly1305
//! ciphertext with its tag. The key id is authenticated too.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher as _, PasswordVerifier as _};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use hmac::{Hmac, Mac as _};
use rand::RngCore as _;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};

use crate::config::{Config, decode_key};

const ID: usize = 4;
const NONCE: usize = 24;
const KEY_FILE: &str = "secret.key";

/// Why a value could not be opened, or a key not be had.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// It was sealed with a key we were not given.
    #[error("sealed with key {id}, which is not among the keys given: add it to WEARSYNC_SECRET_KEY_OLD")]
    MissingKey {
        /// Eight hex digits.
        id: String,
    },
    /// It is not what was sealed, or was sealed for another purpose or owner.
    #[error("the sealed data was altered, or belongs to something else")]
    Altered,
    /// The text is no key.
    #[error("the key must be 32 bytes in base64 or hex")]
    BadKey,
    /// The key file cannot be used.
    #[error("{}: {why}", path.display())]
    File {
        /// Which file or folder.
        path: PathBuf,
        /// In plain words.
        why: String,
    },
}

struct Key {
    id: [u8; ID],
    cipher: XChaCha20Poly1305,
    /// Makes the keys that sign, one for each purpose; they are stored nowhere.
    deriver: Hmac<Sha256>,
}

impl Key {
    fn new(text: &SecretString) -> Result<Self, VaultError> {
        let bytes = decode_key(text).ok_or(VaultError::BadKey)?;
        let mut id = [0; ID];
        id.copy_from_slice(&Sha256::digest(bytes)[..ID]);
        Ok(Self { id, cipher: XChaCha20Poly1305::new(&bytes.into()), deriver: mac(&bytes) })
    }

    fn signer(&self, purpose: &str) -> Hmac<Sha256> {
        mac(&self.deriver.clone().chain_update(b"wearsync ").chain_update(purpose).finalize().into_bytes())
    }
}

fn mac(key: &[u8]) -> Hmac<Sha256> {
    let Ok(mac) = <Hmac<Sha256> as hmac::KeyInit>::new_from_slice(key) else {
        unreachable!("HMAC takes keys of any length")
    };
    mac
}

/// Seals with the newest key, opens with any it was given.
pub struct Vault {
    /// Never empty; the first one seals.
    keys: Vec<Key>,
}

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| hex(&key.id))).finish()
    }
}

impl Vault {
    /// Keys are texts as [`decode_key`] reads them.
    ///
    /// # Errors
    /// [`VaultError::BadKey`].
    pub fn new(primary: &SecretString, older: &[SecretString]) -> Result<Self, VaultError> {
        let keys = std::iter::once(primary).chain(older).map(Key::new).collect::<Result<_, _>>()?;
        Ok(Self { keys })
    }

    /// With the keys of the settings; where none is set, with the key file of the state folder, made when missing.
    ///
    /// # Errors
    /// A bad key, or a key file that cannot be used.
    pub fn from_config(config: &Config) -> Result<Self, VaultError> {
        let state = config.state_dir();
        let mut older = config.secret_key_old.clone();
        let Some(primary) = &config.secret_key else { return Self::new(&load_or_create(&state)?, &older) };
        // Who sets a key later still reads what the key file sealed.
        older.extend(load(&state.join(KEY_FILE))?);
        Self::new(primary, &older)
    }

    /// Seals for one purpose and owner; the same `aad` opens it.
    #[must_use]
    pub fn seal(&self, aad: &[u8], plain: &SecretString) -> Vec<u8> {
        self.seal_bytes(aad, plain.expose_secret().as_bytes())
    }

    /// The reverse of [`Vault::seal`].
    ///
    /// # Errors
    /// [`VaultError::MissingKey`] or [`VaultError::Altered`].
    pub fn open(&self, aad: &[u8], sealed: &[u8]) -> Result<SecretString, VaultError> {
        String::from_utf8(self.open_bytes(aad, sealed)?).map(SecretString::from).map_err(|_| VaultError::Altered)
    }

    /// The same for bytes of any kind.
    #[must_use]
    pub fn seal_bytes(&self, aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let Some(key) = self.keys.first() else { unreachable!("a vault has a key") };
        let mut nonce = [0; NONCE];
        rand::rng().fill_bytes(&mut nonce);
        let payload = Payload { msg: plain, aad: &[&key.id, aad].concat() };
        let Ok(body) = key.cipher.encrypt(&XNonce::from(nonce), payload) else {
            unreachable!("only a text of more than 256 GiB is refused")
        };
        [&key.id[..], &nonce, &body].concat()
    }

    /// The reverse of [`Vault::seal_bytes`].
    ///
    /// # Errors
    /// [`VaultError::MissingKey`] or [`VaultError::Altered`].
    pub fn open_bytes(&self, aad: &[u8], sealed: &[u8]) -> Result<Vec<u8>, VaultError> {
        let (id, rest) = sealed.split_first_chunk::<ID>().ok_or(VaultError::Altered)?;
        let (nonce, body) = rest.split_first_chunk::<NONCE>().ok_or(VaultError::Altered)?;
        let key = self.keys.iter().find(|key| key.id == *id).ok_or_else(|| VaultError::MissingKey { id: hex(id) })?;
        let payload = Payload { msg: body, aad: &[id, aad].concat() };
        key.cipher.decrypt(&XNonce::from(*nonce), payload).map_err(|_| VaultError::Altered)
    }

    /// Texts that nobody without the keys can guess, the same each time for one purpose: one per key, the newest first.
    /// 32 characters of base64url.
    #[must_use]
    pub fn derive(&self, purpose: &str) -> Vec<String> {
        let derive = |key: &Key| {
            let digest = key.signer("token").chain_update(purpose).finalize().into_bytes();
            URL_SAFE_NO_PAD.encode(&digest[..24])
        };
        self.keys.iter().map(derive).collect()
    }

    /// HMAC-SHA256 of a message, with a key of this purpose alone.
    #[must_use]
    pub fn sign(&self, purpose: &str, message: &[u8]) -> [u8; 32] {
        let Some(key) = self.keys.first() else { unreachable!("a vault has a key") };
        key.signer(purpose).chain_update(message).finalize().into_bytes().into()
    }

    /// Whether [`Vault::sign`] made this signature, with any of the keys. Takes the same time for every wrong one.
    #[must_use]
    pub fn is_signed(&self, purpose: &str, message: &[u8], signature: &[u8]) -> bool {
        self.keys.iter().any(|key| key.signer(purpose).chain_update(message).verify_slice(signature).is_ok())
    }

    /// Whether a key other than the newest sealed it.
    #[must_use]
    pub fn needs_reseal(&self, sealed: &[u8]) -> bool {
        self.keys.first().is_some_and(|key| !sealed.starts_with(&key.id))
    }
}

/// The key of the state folder: read from `secret.key`, or made there. The folder gets mode 0700 and a `.gitignore`
/// that leaves out everything.
///
/// # Errors
/// [`VaultError::File`] when it cannot be read or made, or when others can read it.
pub fn load_or_create(state_dir: &Path) -> Result<SecretString, VaultError> {
    prepare_state_folder(state_dir)?;
    let path = state_dir.join(KEY_FILE);
    if let Some(key) = load(&path)? {
        return Ok(key);
    }
    create(state_dir, &path).map_err(|error| file_error(&path, &error))?;
    // Read back, since another process may have been first.
    load(&path)?.ok_or_else(|| VaultError::File { path, why: "vanished while it was made".to_owned() })
}

/// The key in this file; `None` when there is no file.
fn load(path: &Path) -> Result<Option<SecretString>, VaultError> {
    let refuse = |why: String| VaultError::File { path: path.to_owned(), why };
    match fs::metadata(path) {
        Ok(meta) if others_can_read(&meta) => return Err(refuse("others can read this key: chmod 600 it".to_owned())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(file_error(path, &error)),
    }
    let text = fs::read_to_string(path).map_err(|error| file_error(path, &error))?;
    let key = SecretString::from(text.trim().to_owned());
    if decode_key(&key).is_none() {
        return Err(refuse("holds no key of 32 bytes; without it, stored tokens cannot be read".to_owned()));
    }
    Ok(Some(key))
}

fn file_error(path: &Path, error: &io::Error) -> VaultError {
    VaultError::File { path: path.to_owned(), why: error.to_string() }
}

#[cfg(unix)]
fn others_can_read(meta: &fs::Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    meta.permissions().mode() & 0o077 != 0
}

#[cfg(not(unix))]
fn others_can_read(_: &fs::Metadata) -> bool {
    false
}

/// Makes the state folder if it is missing: mode 0700, with a `.gitignore` that leaves out everything. Whoever puts
/// something there calls this first, also where the key is given by a setting.
///
/// # Errors
/// [`VaultError::File`] when it cannot be made.
pub fn prepare_state_folder(state_dir: &Path) -> Result<(), VaultError> {
    prepare(state_dir).map_err(|error| file_error(state_dir, &error))
}

fn prepare(state_dir: &Path) -> io::Result<()> {
    fs::create_dir_all(state_dir)?;
    #[cfg(unix)]
    if others_can_read(&fs::metadata(state_dir)?) {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(state_dir, fs::Permissions::from_mode(0o700))?;
    }
    let ignore = state_dir.join(".gitignore");
    if !ignore.exists() {
        fs::write(ignore, "*\n")?;
    }
    Ok(())
}

/// Whole or not at all, and never over a key that is there: a lost key is lost data.
fn create(state_dir: &Path, path: &Path) -> io::Result<()> {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    let draft = state_dir.join(format!("{KEY_FILE}.{}", uuid::Uuid::new_v4()));
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&draft)?;
    file.write_all(format!("{}\n", STANDARD.encode(bytes)).as_bytes())?;
    file.sync_all()?;
    let linked = fs::hard_link(&draft, path);
    fs::remove_file(&draft)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    #[cfg(unix)]
    fs::File::open(state_dir)?.sync_all()?;
    Ok(())
}

/// A new key for callers: `ws_` and 43 characters of base64url (256 random bits).
#[must_use]
pub fn new_api_key() -> SecretString {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    SecretString::from(format!("ws_{}", URL_SAFE_NO_PAD.encode(bytes)))
}

/// The first characters of a key, which are kept to tell keys apart; the 36 others are too many to guess.
#[must_use]
pub fn key_prefix(key: &SecretString) -> String {
    key.expose_secret().chars().take(10).collect()
}

/// A new secret of another form: the prefix and so many random bytes in hex.
#[must_use]
pub fn new_secret(prefix: &str, bytes: usize) -> SecretString {
    let mut random = vec![0; bytes];
    rand::rng().fill_bytes(&mut random);
    SecretString::from(format!("{prefix}{}", hex(&random)))
}

/// What is compared with where there is no password: the same work, and no password fits.
const NO_PASSWORD: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$d2VhcnN5bmMtbm9ib2R5$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// A password as it may be kept: Argon2id with 19 MiB and two passes, in the PHC form. Takes some 20 ms of a core: never
/// call it where others wait.
#[must_use]
pub fn hash_password(password: &SecretString) -> String {
    let Ok(hash) = Argon2::default().hash_password(password.expose_secret().as_bytes()) else {
        unreachable!("only a password of more than 4 GiB, or a system without random numbers, is refused")
    };
    hash.to_string()
}

/// Whether it is the password that was kept; with none kept, never. Takes the same time either way, and as long as
/// [`hash_password`].
#[must_use]
pub fn is_password(password: &SecretString, kept: Option<&str>) -> bool {
    let fits = PasswordHash::new(kept.unwrap_or(NO_PASSWORD))
        .is_ok_and(|hash| Argon2::default().verify_password(password.expose_secret().as_bytes(), &hash).is_ok());
    fits && kept.is_some()
}

/// SHA-256 (32 bytes). Only for secrets that we made ourselves: they are too random to be guessed from it.
#[must_use]
pub fn hash_secret(secret: &str) -> Vec<u8> {
    Sha256::digest(secret.as_bytes()).to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(fill: u8) -> SecretString {
        SecretString::from(STANDARD.encode([fill; 32]))
    }

    fn secret(text: &str) -> SecretString {
        SecretString::from(text.to_owned())
    }

    #[test]
    fn opens_what_it_sealed_for_the_same_owner_only() {
        let vault = Vault::new(&key(1), &[]).unwrap();
        let sealed = vault.seal(b"refresh:a", &secret("token"));
        assert_eq!(vault.open(b"refresh:a", &sealed).unwrap().expose_secret(), "token");
        assert!(matches!(vault.open(b"refresh:b", &sealed), Err(VaultError::Altered)));
        assert_ne!(sealed, vault.seal(b"refresh:a", &secret("token")), "nonces must differ");
        assert!(!sealed.windows(5).any(|w| w == b"token"));
        assert_eq!(vault.open(b"", &vault.seal(b"", &secret(""))).unwrap().expose_secret(), "");
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_noticed() {
        let vault = Vault::new(&key(1), &[]).unwrap();
        let sealed = vault.seal(b"x", &secret("token"));
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(vault.open(b"x", &bad).is_err(), "byte {at}");
            assert!(vault.open(b"x", &sealed[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_is_derived_depends_on_key_and_purpose() {
        let both = Vault::new(&key(2), &[key(1)]).unwrap();
        let tokens = both.derive("webhook:a");
        assert_eq!(tokens, both.derive("webhook:a"));
        assert_eq!(tokens[1], Vault::new(&key(1), &[]).unwrap().derive("webhook:a")[0]);
        assert!(tokens[0] != tokens[1] && both.derive("webhook:b").iter().all(|token| !tokens.contains(token)));
        assert_eq!(tokens[0].len(), 32);
    }

    #[test]
    fn keys_rotate() {
        let old = Vault::new(&key(1), &[]).unwrap();
        let sealed = old.seal(b"x", &secret("token"));
        let both = Vault::new(&key(2), &[key(1)]).unwrap();
        assert!(both.needs_reseal(&sealed) && !old.needs_reseal(&sealed));
        let plain = both.open(b"x", &sealed).unwrap();
        let resealed = both.seal(b"x", &plain);
        assert!(!both.needs_reseal(&resealed));
        let new = Vault::new(&key(2), &[]).unwrap();
        assert_eq!(new.open(b"x", &resealed).unwrap().expose_secret(), "token");
        let error = new.open(b"x", &sealed).unwrap_err().to_string();
        assert!(error.contains(&hex(&sealed[..4])), "{error}");
        assert!(matches!(Vault::new(&secret("short"), &[]), Err(VaultError::BadKey)));
        assert!(!format!("{both:?}").contains(key(2).expose_secret()));
    }

    #[cfg(unix)]
    #[test]
    fn the_key_file_is_made_once_and_only_for_us() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("data/state");
        let made = load_or_create(&state).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let file = state.join("secret.key");
        assert_eq!((mode(&state), mode(&file)), (0o700, 0o600));
        assert_eq!(fs::read_to_string(state.join(".gitignore")).unwrap(), "*\n");
        assert_eq!(fs::read_dir(&state).unwrap().count(), 2, "no draft is left");
        assert_eq!(load_or_create(&state).unwrap().expose_secret(), made.expose_secret());

        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(load_or_create(&state).unwrap_err().to_string().contains("chmod 600"));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&file, "").unwrap();
        assert!(load_or_create(&state).is_err(), "a broken key is not replaced");
    }

    #[test]
    fn starting_together_gives_one_key() {
        let dir = tempfile::tempdir().unwrap();
        let keys: Vec<String> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| load_or_create(dir.path()).unwrap())).collect();
            starts.into_iter().map(|start| start.join().unwrap().expose_secret().to_owned()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    #[test]
    fn a_key_set_later_still_reads_what_the_key_file_sealed() {
        let dir = tempfile::tempdir().unwrap();
        let data = ("WEARSYNC_DATA_DIR".to_owned(), dir.path().to_str().unwrap().to_owned());
        let before = Vault::from_config(&Config::load(None, [data.clone()]).unwrap()).unwrap();
        let sealed = before.seal(b"x", &secret("token"));
        let set = ("WEARSYNC_SECRET_KEY".to_owned(), key(7).expose_secret().to_owned());
        let after = Vault::from_config(&Config::load(None, [data, set]).unwrap()).unwrap();
        assert_eq!(after.open(b"x", &sealed).unwrap().expose_secret(), "token");
        assert!(after.needs_reseal(&sealed));
    }

    #[test]
    fn a_signature_is_of_its_purpose_message_and_key() {
        let vault = Vault::new(&key(1), &[]).unwrap();
        let signature = vault.sign("a", b"message");
        assert!(vault.is_signed("a", b"message", &signature));
        assert!(!vault.is_signed("b", b"message", &signature) && !vault.is_signed("a", b"massage", &signature));
        assert!(!vault.is_signed("a", b"message", &signature[..31]) && !vault.is_signed("a", b"message", b""));
        assert!(Vault::new(&key(2), &[key(1)]).unwrap().is_signed("a", b"message", &signature), "an older key");
        assert!(!Vault::new(&key(2), &[]).unwrap().is_signed("a", b"message", &signature));
    }

    #[test]
    fn passwords_are_recognised_and_nothing_else_is() {
        let kept = hash_password(&secret("correct horse"));
        assert!(kept.starts_with("$argon2id$v=19$m=19456,t=2,p=1$") && kept != hash_password(&secret("correct horse")));
        assert!(is_password(&secret("correct horse"), Some(&kept)));
        assert!(!is_password(&secret("correct horsf"), Some(&kept)) && !is_password(&secret(""), Some(&kept)));
        assert!(!is_password(&secret("correct horse"), None) && !is_password(&secret("x"), Some("no hash")));
        // The same work where there is nobody.
        assert_eq!(kept.split('$').nth(3), NO_PASSWORD.split('$').nth(3));
        assert!(PasswordHash::new(NO_PASSWORD).is_ok_and(|hash| hash.hash.is_some_and(|hash| hash.len() == 32)));
    }

    #[test]
    fn api_keys_and_hashes() {
        let key = new_api_key();
        let text = key.expose_secret();
        assert!(text.len() == 46 && text.starts_with("ws_") && text != new_api_key().expose_secret());
        assert!(text[3..].bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
        assert_eq!(hex(&hash_secret("abc"))[..16], *"ba7816bf8f01cfea");
    }
}
