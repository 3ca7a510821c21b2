//! What is run in the guest, and what is read out of its answers.

use serde_json::Value;

use super::Failure;

/// Results of one job.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Outcome {
    /// I/Os (fio) or packets.
    pub(super) operations: u64,
    /// I/Os a second; `None` where it says nothing.
    pub(super) iops: Option<f64>,
    /// Bytes a second.
    pub(super) bytes_per_second: Option<f64>,
    /// Median and 99th percentile of the completion latency, in microseconds.
    pub(super) latency_us: Option<(f64, f64)>,
}

/// An fio job.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fio {
    pub(super) engine: &'static str,
    pub(super) write: bool,
    pub(super) depth: u32,
    /// Bytes in all.
    pub(super) size: u64,
}

/// One job for each vCPU, so that each uses its own queue.
const JOBS: u64 = 2;

impl Fio {
    pub(super) fn title(&self) -> String {
        let what = if self.write {
            "sequential write"
        } else {
            "random read"
        };
        format!("{what}, {}", self.engine)
    }

    /// Writes leave a checksum in every 4 KiB, and read it back; reads check what was written.
    pub(super) fn command(&self) -> Vec<String> {
        let part = self.size / JOBS;
        let mut argv: Vec<String> = [
            "fio",
            "--name=demo",
            "--filename=/dev/nvme0n1",
            "--direct=1",
            "--verify=crc32c",
            "--verify_interval=4k",
            "--verify_fatal=1",
            "--randseed=1",
            "--cpus_allowed=0-1",
            "--cpus_allowed_policy=split",
            "--group_reporting",
            "--thread",
            "--output-format=json",
        ]
        .map(str::to_owned)
        .to_vec();
        argv.push(format!("--ioengine={}", self.engine));
        argv.push(format!("--iodepth={}", self.depth));
        argv.push(format!("--numjobs={JOBS}"));
        argv.push(format!("--size={part}"));
        argv.push(format!("--offset_increment={part}"));
        if self.write {
            argv.extend(["--rw=write", "--bs=64k", "--do_verify=1"].map(str::to_owned));
        } else {
            argv.extend(["--rw=randread", "--bs=4k", "--verify_header_seed=0"].map(str::to_owned));
        }
        argv
    }

    /// Reads fio's JSON. An error in it is an error here.
    pub(super) fn parse(&self, text: &str) -> Result<Outcome, Failure> {
        let malformed = || Failure::Other(format!("fio's output is not as expected: {text:.200}"));
        // fio may print notes before the JSON.
        let start = text.find('{').ok_or_else(malformed)?;
        let tree: Value =
            serde_json::from_str(text.get(start..).unwrap_or_default()).map_err(|_| malformed())?;
        let job = tree.pointer("/jobs/0").ok_or_else(malformed)?;
        let error = job
            .get("error")
            .and_then(Value::as_i64)
            .ok_or_else(malformed)?;
        if error != 0 {
            return Err(Failure::Other(format!(
                "fio reports error {error} ({})",
                self.title()
            )));
        }
        let side = |name: &str| job.get(name).ok_or_else(malformed);
        let ios = |side: &Value| side.get("total_ios").and_then(Value::as_u64);
        let (write, read) = (side("write")?, side("read")?);
        let (wrote, read_back) = (
            ios(write).ok_or_else(malformed)?,
            ios(read).ok_or_else(malformed)?,
        );
        if (self.write && wrote == 0) || read_back == 0 {
            return Err(Failure::Other(format!(
                "fio checked nothing ({}): {wrote} writes, {read_back} reads",
                self.title()
            )));
        }
        let measured = if self.write { write } else { read };
        let number = |name: &str| measured.get(name).and_then(Value::as_f64);
        let percentile = |name: &str| {
            let nanoseconds = measured.pointer(&format!("/clat_ns/percentile/{name}"));
            nanoseconds.and_then(Value::as_f64).map(|ns| ns / 1e3)
        };
        Ok(Outcome {
            operations: wrote + read_back,
            iops: number("iops"),
            bytes_per_second: number("bw_bytes"),
            latency_us: percentile("50.000000").zip(percentile("99.000000")),
        })
    }
}

/// Bytes a second, from what iperf3 says was received.
pub(super) fn parse_iperf(text: &str) -> Result<f64, Failure> {
    let tree: Value = serde_json::from_str(text)
        .map_err(|error| Failure::Other(format!("iperf3's output is not JSON: {error}")))?;
    if let Some(error) = tree.get("error").and_then(Value::as_str) {
        return Err(Failure::Other(format!("iperf3: {error}")));
    }
    tree.pointer("/end/sum_received/bits_per_second")
        .and_then(Value::as_f64)
        .filter(|bits| *bits > 0.0)
        .map(|bits| bits / 8.0)
        .ok_or_else(|| Failure::Other("iperf3 received nothing".into()))
}

/// Average and maximum round trip in microseconds, from ping's last line; every packet must have
/// come back.
pub(super) fn parse_ping(text: &str) -> Result<(f64, f64), Failure> {
    let lost = || Failure::Other(format!("ping lost packets:\n{}", text.trim()));
    if !text.contains(" 0% packet loss") {
        return Err(lost());
    }
    let line = text
        .lines()
        .find(|line| line.contains("min/avg/max"))
        .ok_or_else(lost)?;
    let numbers = line.split_once('=').ok_or_else(lost)?.1;
    let milliseconds: Vec<f64> = numbers
        .trim()
        .split(['/', ' '])
        .map_while(|number| number.parse().ok())
        .collect();
    match milliseconds.as_slice() {
        [_, average, maximum, ..] => Ok((average * 1e3, maximum * 1e3)),
        _ => Err(lost()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Fio = Fio {
        engine: "psync",
        write: false,
        depth: 1,
        size: 8 << 20,
    };

    fn answer(error: i64, reads: u64) -> String {
        format!(
            r#"note: something
            {{"jobs": [{{"error": {error},
              "read": {{"total_ios": {reads}, "iops": 500.5, "bw_bytes": 2050048,
                "clat_ns": {{"percentile": {{"50.000000": 1500000, "99.000000": 9000000}}}}}},
              "write": {{"total_ios": 0, "iops": 0, "bw_bytes": 0}}}}]}}"#
        )
    }

    #[test]
    fn fio_results_are_read() {
        let outcome = READ.parse(&answer(0, 2048)).unwrap();
        assert_eq!(outcome.operations, 2048);
        assert_eq!(outcome.iops, Some(500.5));
        assert_eq!(outcome.latency_us, Some((1500.0, 9000.0)));
    }

    #[test]
    fn an_fio_that_failed_or_checked_nothing_is_an_error() {
        assert!(READ.parse(&answer(84, 2048)).is_err());
        assert!(READ.parse(&answer(0, 0)).is_err());
        assert!(READ.parse("fio: no such file").is_err());
        let write = Fio {
            write: true,
            ..READ
        };
        assert!(write.parse(&answer(0, 2048)).is_err());
    }

    #[test]
    fn pings_must_all_come_back() {
        let text = "5 packets transmitted, 5 packets received, 0% packet loss\n\
                    round-trip min/avg/max = 0.4/1.5/2.25 ms\n";
        assert_eq!(parse_ping(text).unwrap(), (1500.0, 2250.0));
        let iputils = "5 packets transmitted, 5 received, 0% packet loss, time 4005ms\n\
                       rtt min/avg/max/mdev = 0.4/1.5/2.25/0.1 ms\n";
        assert_eq!(parse_ping(iputils).unwrap(), (1500.0, 2250.0));
        assert!(parse_ping(&text.replace(" 0%", " 20%")).is_err());
        assert!(parse_ping(&text.replace(" 0%", " 100%")).is_err());
        assert!(parse_ping("").is_err());
    }

    #[test]
    fn iperf_results_are_read() {
        let good = r#"{"end": {"sum_received": {"bits_per_second": 8000.0}}}"#;
        assert_eq!(parse_iperf(good).unwrap(), 1000.0);
        assert!(parse_iperf(r#"{"error": "unable to connect", "end": {}}"#).is_err());
        assert!(parse_iperf("{}").is_err());
    }
}
