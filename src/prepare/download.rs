//! Downloads that survive a cut connection and never leave a half file under the final name.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use ureq::{Agent, Proxy, http::Uri};

/// How often a download is tried before it is given up; each try goes on where the last one ended.
const TRIES: u32 = 5;
/// Silence after which a connection counts as cut.
const SILENCE: Duration = Duration::from_secs(30);

/// Downloads `url` to `dest`, whose directory must exist.
///
/// The bytes gather in `dest.part`, are checked against `expected_len` and `expected_sha256` (hexadecimal) and only
/// then renamed, so `dest` is whole or absent. With a checksum to prove the whole, a part that an earlier try or an
/// earlier process left is continued; without one every try begins anew. `progress` draws a bar on a terminal's
/// standard error.
///
/// Proxies are taken from `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`.
pub fn download(
    url: &str,
    dest: &Path,
    expected_sha256: Option<&str>,
    expected_len: Option<u64>,
    progress: bool,
) -> Result<()> {
    let mut name = OsString::from(dest.as_os_str());
    name.push(".part");
    let download = Download {
        url,
        part: PathBuf::from(name),
        expected_sha256,
        expected_len,
        bar: progress_bar(progress, expected_len),
    };
    let result = download.run();
    download.bar.finish_and_clear();
    result.with_context(|| {
        format!(
            "could not download {url}; check the network (a proxy is set by HTTPS_PROXY) and run this again, \
             or download the file by hand to {}",
            dest.display()
        )
    })?;
    fs::rename(&download.part, dest).with_context(|| format!("cannot write {}", dest.display()))
}

/// The SHA-256 of a file, in lowercase hexadecimal.
pub fn sha256_file(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Bytes in lowercase hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A bar that counts bytes; hidden unless `shown`, and wherever standard error is no terminal.
pub fn progress_bar(shown: bool, bytes: Option<u64>) -> ProgressBar {
    const TEMPLATE: &str = "{bar:32} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    if !shown {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(bytes.unwrap_or(0)).with_style(style)
}

/// Why a try failed, and with it whether another one can help.
enum Failure {
    /// The connection or the server: go on from here.
    Cut(anyhow::Error),
    /// What is there cannot become the file: begin anew.
    Spoiled(anyhow::Error),
    /// Nothing that trying again would change.
    Final(anyhow::Error),
}

struct Download<'a> {
    url: &'a str,
    part: PathBuf,
    expected_sha256: Option<&'a str>,
    expected_len: Option<u64>,
    bar: ProgressBar,
}

impl Download<'_> {
    fn run(&self) -> Result<()> {
        let agent = self.agent();
        let mut pause = Duration::from_millis(200);
        for left in (0..TRIES).rev() {
            let continued = self.have() > 0;
            let error = match self.fetch(&agent).and_then(|()| self.verify()) {
                Ok(()) => return Ok(()),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Cut(error)) => error,
                Err(Failure::Spoiled(error)) => {
                    if self.part.exists() {
                        fs::remove_file(&self.part).with_context(|| self.at_part("cannot remove"))?;
                    }
                    if !continued {
                        return Err(error); // wrong although it came in one piece: it would come again
                    }
                    error
                }
            };
            if left == 0 {
                return Err(error);
            }
            thread::sleep(pause);
            pause *= 2;
        }
        bail!("no try left")
    }

    /// How many bytes an earlier try left that this one may continue.
    fn have(&self) -> u64 {
        match self.expected_sha256 {
            Some(_) => fs::metadata(&self.part).map_or(0, |part| part.len()),
            None => 0,
        }
    }

    fn agent(&self) -> Agent {
        // A proxy that the environment names cannot mean this machine itself.
        let local = self.url.parse::<Uri>().is_ok_and(|uri| matches!(uri.host(), Some("127.0.0.1" | "localhost")));
        Agent::config_builder()
            .proxy(if local { None } else { Proxy::try_from_env() })
            .timeout_connect(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .http_status_as_error(false)
            .user_agent(concat!("gpt-wgpu/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent()
    }

    /// One request; appends what comes to the part, or begins it anew.
    fn fetch(&self, agent: &Agent) -> Result<(), Failure> {
        let mut have = self.have();
        if self.expected_len.is_some_and(|len| have >= len) && have > 0 {
            return Ok(()); // whole or too long: the check tells
        }
        // Compressed bytes could be neither counted nor continued.
        let mut request = agent.get(self.url).header("Accept-Encoding", "identity");
        if have > 0 {
            request = request.header("Range", format!("bytes={have}-"));
        }
        let response = request.call().map_err(|error| match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
                Failure::Final(error.into())
            }
            other => Failure::Cut(other.into()),
        })?;
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        match response.status().as_u16() {
            206 if have > 0 && header("content-range").is_some_and(|r| r.starts_with(&format!("bytes {have}-"))) => (),
            200 => have = 0, // a server without ranges sends the whole file
            206 | 416 => {
                return Err(Failure::Spoiled(anyhow!("the server cannot continue at byte {have}")));
            }
            status @ (408 | 429 | 500..) => {
                return Err(Failure::Cut(anyhow!("the server answered with status {status}")));
            }
            status => {
                return Err(Failure::Final(anyhow!("the server answered with status {status}")));
            }
        }
        let announced = header("content-length").and_then(|len| len.parse::<u64>().ok()).map(|len| have + len);
        if let Some(total) = self.expected_len.or(announced) {
            self.bar.set_length(total);
        }
        self.bar.set_position(have);
        self.bar.reset_eta();

        let received = self.append(&mut response.into_body().into_reader(), have)?;
        match self.expected_len.or(announced) {
            Some(total) if received < total => {
                Err(Failure::Cut(anyhow!("the connection ended after {received} of {total} bytes")))
            }
            _ => Ok(()),
        }
    }

    /// Writes `body` to the part from byte `have` on and returns the length that it has then.
    fn append(&self, body: &mut impl Read, have: u64) -> Result<u64, Failure> {
        let disk = |error| Failure::Final(anyhow::Error::new(error).context(self.at_part("cannot write")));
        let mut file = OpenOptions::new().create(true).append(true).open(&self.part).map_err(disk)?;
        file.set_len(have).map_err(disk)?;
        let mut received = have;
        let mut buffer = vec![0; 1 << 16];
        loop {
            match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    file.write_all(&buffer[..n]).map_err(disk)?;
                    received += n as u64;
                    self.bar.inc(n as u64);
                }
                Err(error) => {
                    return Err(Failure::Cut(anyhow!("the connection was cut after {received} bytes ({error})")));
                }
            }
        }
        file.sync_all().map_err(disk)?;
        Ok(received)
    }

    fn verify(&self) -> Result<(), Failure> {
        let read = |error| Failure::Final(anyhow::Error::new(error).context(self.at_part("cannot read")));
        let len = fs::metadata(&self.part).map_err(read)?.len();
        if let Some(expected) = self.expected_len.filter(|&expected| expected != len) {
            return Err(Failure::Spoiled(anyhow!("the file has {len} bytes instead of {expected}")));
        }
        if let Some(expected) = self.expected_sha256 {
            let found = sha256_file(&self.part).map_err(read)?;
            if !found.eq_ignore_ascii_case(expected) {
                return Err(Failure::Spoiled(anyhow!("the file's SHA-256 is {found} instead of {expected}")));
            }
        }
        Ok(())
    }

    fn at_part(&self, what: &str) -> String {
        format!("{what} {}", self.part.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{BufRead, BufReader},
        net::TcpListener,
        sync::mpsc,
    };

    const TEXT: &[u8] = b"the quick brown fox jumps over the lazy dog";

    /// What the server does with one connection.
    enum Answer {
        /// Sends the range that was asked for.
        Range,
        /// As above, but the connection ends after so many bytes.
        Cut(usize),
        /// The whole text, whatever was asked for.
        Whole,
        Status(u16),
    }

    /// Serves TEXT, one answer a connection; the returned channel tells the first byte that each request asked for.
    fn serve(answers: Vec<Answer>) -> (String, mpsc::Receiver<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/file", listener.local_addr().unwrap());
        let (sender, asked) = mpsc::channel();
        thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let request = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
                let from = request.take_while(|line| !line.is_empty()).fold(0, |from, line| {
                    let range =
                        line.to_lowercase().strip_prefix("range: bytes=").map(|r| r.trim_end_matches('-').parse());
                    range.map_or(from, Result::unwrap)
                });
                sender.send(from).unwrap();
                let (from, take) = match answer {
                    Answer::Range => (from, TEXT.len()),
                    Answer::Cut(take) => (from, take),
                    Answer::Whole => (0, TEXT.len()),
                    Answer::Status(status) => {
                        write!(stream, "HTTP/1.1 {status} Status\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                            .unwrap();
                        continue;
                    }
                };
                let body = &TEXT[from..];
                let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
                let range = format!("Content-Range: bytes {from}-{}/{}", TEXT.len() - 1, TEXT.len());
                let head =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{range}\r\nConnection: close", body.len());
                write!(stream, "{head}\r\n\r\n").unwrap();
                stream.write_all(&body[..take.min(body.len())]).unwrap();
            }
        });
        (url, asked)
    }

    /// Downloads from a server with these answers; returns the file or the error, and the offsets asked for.
    fn fetch(answers: Vec<Answer>, part: &[u8], sha256: Option<&str>) -> (Result<Vec<u8>, String>, Vec<usize>) {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("file.txt");
        let part_path = dir.path().join("file.txt.part");
        fs::write(&part_path, part).unwrap();
        let (url, asked) = serve(answers);
        let result = download(&url, &dest, sha256, None, false);
        assert_eq!(dest.exists(), result.is_ok(), "the final name appears exactly on success");
        assert!(result.is_err() || !part_path.exists());
        let result = result.map(|()| fs::read(&dest).unwrap()).map_err(|error| format!("{error:#}"));
        (result, asked.try_iter().collect())
    }

    fn sum() -> String {
        hex(&Sha256::digest(TEXT))
    }

    #[test]
    fn a_cut_connection_is_continued() {
        let (result, asked) = fetch(vec![Answer::Cut(10), Answer::Cut(5), Answer::Range], b"", Some(&sum()));
        assert_eq!(result.unwrap(), TEXT);
        assert_eq!(asked, [0, 10, 15]);
    }

    #[test]
    fn an_earlier_part_is_continued() {
        let (result, asked) = fetch(vec![Answer::Range], &TEXT[..20], Some(&sum()));
        assert_eq!(result.unwrap(), TEXT);
        assert_eq!(asked, [20]);
    }

    #[test]
    fn without_a_checksum_nothing_is_continued() {
        let (result, asked) = fetch(vec![Answer::Cut(10), Answer::Range], b"something else", None);
        assert_eq!(result.unwrap(), TEXT);
        assert_eq!(asked, [0, 0]);
    }

    #[test]
    fn a_server_without_ranges_sends_it_all_again() {
        let (result, asked) = fetch(vec![Answer::Whole], &TEXT[..20], Some(&sum()));
        assert_eq!(result.unwrap(), TEXT);
        assert_eq!(asked, [20]);
    }

    #[test]
    fn a_foreign_part_is_thrown_away() {
        let (result, asked) = fetch(vec![Answer::Range, Answer::Range], b"not the text", Some(&sum()));
        assert_eq!(result.unwrap(), TEXT);
        assert_eq!(asked, [12, 0]);
        let (result, asked) = fetch(vec![Answer::Status(416), Answer::Range], &[b'x'; 99], Some(&sum()));
        assert_eq!(result.unwrap(), TEXT);
        assert_eq!(asked, [99, 0]);
    }

    #[test]
    fn a_wrong_checksum_is_an_error() {
        let (result, asked) = fetch(vec![Answer::Range], b"", Some(&"0".repeat(64)));
        let message = result.unwrap_err();
        assert!(message.contains(&sum()) && message.contains("file.txt"), "{message}");
        assert_eq!(asked, [0], "a second try would bring the same");
    }

    #[test]
    fn a_missing_page_is_an_error_at_once_and_a_busy_server_is_not() {
        let (result, asked) = fetch(vec![Answer::Status(404)], b"", None);
        let message = result.unwrap_err();
        assert!(message.contains("404") && message.contains("by hand to"), "{message}");
        assert_eq!(asked, [0]);
        let (result, _) = fetch(vec![Answer::Status(503), Answer::Range], b"", None);
        assert_eq!(result.unwrap(), TEXT);
    }

    #[test]
    fn a_wrong_length_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (url, _asked) = serve(vec![Answer::Range]);
        let error = download(&url, &dir.path().join("f"), None, Some(7), false).unwrap_err();
        assert!(format!("{error:#}").contains("43 bytes instead of 7"), "{error:#}");
    }
}
