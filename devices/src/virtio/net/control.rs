//! The control queue (Virtio 1.2, 5.1.6.5).

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use iommu::Access;

use super::device::Core;
use super::filter::{Filter, Mac, MacTable, TABLE};
use super::pair::{Pair, RECEIVE, TRANSMIT};
use super::spec::{self, ctrl, feature};
use crate::virtio::{
    Chain, DmaTask, Fault, RingError, Slices, Virtqueue, copy_in, copy_out, resolve,
};
use crate::worker::{Coalesce, Polled, QueueTask, Worker};

/// Longest command that is read: a header and two MAC tables of about 5,000 entries each.
const MAX_COMMAND: usize = 64 * 1024;

/// The control queue as a worker's task. Commands change the pairs on their own workers, so that an
/// answered command is in force everywhere.
pub(super) struct Control {
    dma: DmaTask,
    queue: Option<Virtqueue>,
    core: Arc<Core>,
    pairs: Arc<Vec<Option<Worker<Pair>>>>,
    features: u64,
    filter: Filter,
    running: bool,
    chain: Chain,
    command: Vec<u8>,
    /// The answer to the command in `chain`, while it could not be written.
    answer: Option<u8>,
}

impl Control {
    pub(super) fn new(
        dma: DmaTask,
        queue: Virtqueue,
        core: Arc<Core>,
        pairs: Arc<Vec<Option<Worker<Pair>>>>,
        features: u64,
        filter: Filter,
    ) -> Control {
        Control {
            dma,
            queue: Some(queue),
            core,
            pairs,
            features,
            filter,
            running: false,
            chain: Chain::new(),
            command: Vec::new(),
            answer: None,
        }
    }

    /// Lets go of the queue, with a command that is not answered yet.
    pub(super) fn stop(&mut self) {
        self.queue = None;
        self.answer = None;
    }

    /// Takes the queue up again.
    pub(super) fn start(&mut self, queue: Virtqueue) {
        self.queue = Some(queue);
    }

    /// Takes one command and answers it; false if there is none.
    fn step(&mut self) -> Result<bool, RingError> {
        if self.answer.is_none() {
            if !self.fetch()? {
                return Ok(false);
            }
            // Outside of a section: it waits for other workers.
            self.answer = Some(self.execute());
            self.core.commands.add(1);
        }
        self.finish()?;
        Ok(true)
    }

    /// Takes a command off the ring into `command`.
    fn fetch(&mut self) -> Result<bool, RingError> {
        let _section = self.dma.enter().ok_or(RingError::Halted)?;
        let mem = self.dma.mem();
        let Some(queue) = &mut self.queue else {
            return Ok(false);
        };
        if !queue.ring.pop_into(mem, &mut self.chain)? {
            return Ok(false);
        }
        let mut slices = Slices::new();
        let fetched = if self.chain.writable_len() == 0 {
            Err(Fault::Request.into())
        } else {
            resolve(mem, self.chain.readable(), Access::Read, &mut slices)
        };
        if let Err(error) = fetched {
            queue.ring.unpop();
            return Err(error);
        }
        let len = usize::try_from(self.chain.readable_len()).unwrap_or(usize::MAX);
        // A longer command ends in an error: its tables do not fit what was read.
        self.command.clear();
        self.command.resize(len.min(MAX_COMMAND), 0);
        copy_out(&slices, 0, &mut self.command);
        Ok(true)
    }

    /// Writes the answer and returns the chain.
    fn finish(&mut self) -> Result<(), RingError> {
        let _section = self.dma.enter().ok_or(RingError::Halted)?;
        let mem = self.dma.mem();
        let (Some(queue), Some(answer)) = (&mut self.queue, self.answer) else {
            self.answer = None;
            return Ok(());
        };
        let mut slices = Slices::new();
        resolve(mem, self.chain.writable(), Access::Write, &mut slices)?;
        copy_in(&slices, 0, &[answer]);
        self.answer = None;
        queue.ring.push_used(self.chain.head(), 1);
        Ok(())
    }

    fn execute(&mut self) -> u8 {
        let command = std::mem::take(&mut self.command);
        let done = match command.split_first_chunk::<2>() {
            Some((&[class, command], data)) => self.dispatch(class, command, data),
            None => None,
        };
        self.command = command;
        match done {
            Some(()) => ctrl::OK,
            None => ctrl::ERR,
        }
    }

    /// Does the command; `None` if it is unknown, not negotiated, or wrong.
    fn dispatch(&mut self, class: u8, command: u8, data: &[u8]) -> Option<()> {
        let needs = match (class, command) {
            (ctrl::RX, ctrl::RX_PROMISC | ctrl::RX_ALLMULTI) => feature::CTRL_RX,
            (ctrl::RX, _) => feature::CTRL_RX_EXTRA,
            (ctrl::MAC, ctrl::MAC_ADDR_SET) => feature::CTRL_MAC_ADDR,
            (ctrl::MAC, _) => feature::CTRL_RX,
            (ctrl::VLAN, _) => feature::CTRL_VLAN,
            (ctrl::MQ, _) => feature::MQ,
            (ctrl::GUEST_OFFLOADS, _) => feature::CTRL_GUEST_OFFLOADS,
            (ctrl::NOTF_COAL, _) => feature::NOTF_COAL,
            _ => return None,
        };
        if self.features & needs == 0 {
            return None;
        }
        match (class, command) {
            (ctrl::RX, mode) => self.set_mode(mode, data)?,
            (ctrl::MAC, ctrl::MAC_ADDR_SET) => self.set_mac(*data.first_chunk()?)?,
            (ctrl::MAC, ctrl::MAC_TABLE_SET) => self.set_tables(data)?,
            (ctrl::VLAN, ctrl::VLAN_ADD | ctrl::VLAN_DEL) => {
                let vlan = u16::from_le_bytes(*data.first_chunk()?);
                self.filter
                    .set_vlan(vlan, command == ctrl::VLAN_ADD)
                    .then_some(())?;
            }
            (ctrl::MQ, ctrl::MQ_VQ_PAIRS_SET) => {
                return self.set_pairs(u16::from_le_bytes(*data.first_chunk()?));
            }
            (ctrl::GUEST_OFFLOADS, ctrl::GUEST_OFFLOADS_SET) => {
                return self.set_offloads(u64::from_le_bytes(*data.first_chunk()?));
            }
            (ctrl::NOTF_COAL, ctrl::NOTF_COAL_TX_SET) => {
                return self.set_coalesce(TRANSMIT, data);
            }
            (ctrl::NOTF_COAL, ctrl::NOTF_COAL_RX_SET) => {
                return self.set_coalesce(RECEIVE, data);
            }
            _ => return None,
        }
        self.spread_filter();
        Some(())
    }

    fn set_mode(&mut self, mode: u8, data: &[u8]) -> Option<()> {
        let on = match *data.first()? {
            0 => false,
            1 => true,
            _ => return None,
        };
        let filter = &mut self.filter;
        let flag = match mode {
            ctrl::RX_PROMISC => &mut filter.promiscuous,
            ctrl::RX_ALLMULTI => &mut filter.all_multicast,
            ctrl::RX_ALLUNI => &mut filter.all_unicast,
            ctrl::RX_NOMULTI => &mut filter.no_multicast,
            ctrl::RX_NOUNI => &mut filter.no_unicast,
            ctrl::RX_NOBCAST => &mut filter.no_broadcast,
            _ => return None,
        };
        *flag = on;
        Some(())
    }

    fn set_mac(&mut self, mac: Mac) -> Option<()> {
        if mac[0] & 1 != 0 {
            return None;
        }
        self.filter.mac = mac;
        self.core.set_mac(mac);
        Some(())
    }

    /// Two tables, unicast then multicast; none changes unless both are whole.
    fn set_tables(&mut self, data: &[u8]) -> Option<()> {
        let (unicast, rest) = read_table(data)?;
        let (multicast, _) = read_table(rest)?;
        self.filter.unicast = unicast;
        self.filter.multicast = multicast;
        Some(())
    }

    fn set_pairs(&mut self, pairs: u16) -> Option<()> {
        if pairs == 0 || usize::from(pairs) > self.pairs.len() {
            return None;
        }
        let before = self.core.active_pairs();
        // Shrinking: no packet is queued on a pair that is no longer active once the command is
        // answered (5.1.6.5.5.1), so the pairs go first. Growing: the back end goes first.
        self.activate(pairs.min(before));
        if let Err(error) = self.core.backend.set_active_pairs(pairs) {
            self.core
                .warn(&format_args!("cannot use {pairs} queue pairs: {error}"));
            self.activate(before);
            return None;
        }
        self.activate(pairs);
        self.core.set_active_pairs(pairs);
        Some(())
    }

    fn activate(&self, pairs: u16) {
        for (index, worker) in (0u16..).zip(self.pairs.iter()) {
            if let Some(worker) = worker {
                worker.with(move |pair| pair.set_active(index < pairs));
            }
        }
    }

    fn set_offloads(&mut self, offloads: u64) -> Option<()> {
        let negotiated = self.features & feature::GUEST_OFFLOADS;
        if offloads & !negotiated != 0 || !spec::dependencies_met(offloads) {
            return None;
        }
        if let Err(error) = self.core.set_offloads(offloads) {
            self.core
                .warn(&format_args!("cannot change receive offloads: {error}"));
            return None;
        }
        for worker in self.pairs.iter().flatten() {
            worker.with(move |pair| pair.set_offloads(offloads));
        }
        Some(())
    }

    /// `ethtool -C`: in force until the next reset, like all that the driver sets.
    fn set_coalesce(&self, source: usize, data: &[u8]) -> Option<()> {
        let coalesce = read_coalesce(data)?;
        for worker in self.pairs.iter().flatten() {
            worker.set_coalesce(source, coalesce);
        }
        Some(())
    }

    fn spread_filter(&self) {
        for worker in self.pairs.iter().flatten() {
            let filter = self.filter.clone();
            worker.with(move |pair| pair.set_filter(filter));
        }
    }

    /// What a queue that starts later must begin with.
    pub(super) fn filter(&self) -> &Filter {
        &self.filter
    }
}

/// Reads `virtio_net_ctrl_coal`. A zero is no bound: `ethtool -C` without a number of frames sends
/// one and means that time alone counts (Linux, include/uapi/linux/ethtool.h, `ethtool_coalesce`).
/// Without a time there is no moderation, or a last packet would wait for ever.
fn read_coalesce(data: &[u8]) -> Option<Coalesce> {
    let (packets, rest) = data.split_first_chunk::<4>()?;
    let usecs = u32::from_le_bytes(*rest.first_chunk()?);
    Some(Coalesce {
        max_events: match u32::from_le_bytes(*packets) {
            0 => u32::MAX,
            packets => packets,
        },
        max_delay: Duration::from_micros(usecs.into()),
    })
}

/// Reads one `virtio_net_ctrl_mac` table; returns it with the bytes behind it.
fn read_table(data: &[u8]) -> Option<(MacTable, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (entries, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let overflow = count > TABLE;
    let entries = if overflow {
        Vec::new()
    } else {
        entries.as_chunks::<6>().0.to_vec()
    };
    Some((MacTable { entries, overflow }, rest))
}

impl QueueTask for Control {
    fn poll(&mut self, budget: u32) -> Polled {
        let mut polled = Polled::default();
        self.running = self.dma.enter().is_some();
        while self.running && polled.work < budget {
            match self.step() {
                Ok(true) => polled.work += 1,
                Ok(false) => break,
                Err(error) => {
                    if let Some(queue) = &self.queue {
                        queue.report(error);
                    }
                    break;
                }
            }
        }
        if let Some(_section) = self.dma.enter()
            && let Some(queue) = &mut self.queue
        {
            polled.events[0] = queue.publish(self.dma.mem());
        }
        polled
    }

    fn arm(&mut self) {
        if let Some(_section) = self.dma.enter()
            && let Some(queue) = &mut self.queue
            && let Err(error) = queue.ring.enable_notify(self.dma.mem())
        {
            queue.report(error);
        }
    }

    fn has_work(&mut self) -> bool {
        let (Some(_section), Some(queue)) = (self.dma.enter(), &self.queue) else {
            return false;
        };
        // An error is found again, and reported, by the poll.
        !self.running || queue.ring.available(self.dma.mem()).unwrap_or(true)
    }

    fn disarm(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        queue.take_notifications();
        if let Some(_section) = self.dma.enter()
            && let Err(error) = queue.ring.disable_notify(self.dma.mem())
        {
            queue.report(error);
        }
    }

    fn interrupt(&mut self, _source: usize) {
        if let Some(queue) = &self.queue {
            queue.interrupt();
        }
    }

    fn fds(&self, fds: &mut Vec<RawFd>) {
        fds.extend(self.queue.as_ref().map(Virtqueue::fd));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_read_whole_or_not_at_all() {
        let mut data = 2u32.to_le_bytes().to_vec();
        data.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
        data.extend(0u32.to_le_bytes());
        let (table, rest) = read_table(&data).unwrap();
        assert_eq!(table.entries, [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]]);
        let (second, rest) = read_table(rest).unwrap();
        assert!(second == MacTable::default() && rest.is_empty());
        assert_eq!(read_table(&data[..15]), None);
        assert_eq!(read_table(&[1, 0, 0]), None);
        assert_eq!(read_table(&u32::MAX.to_le_bytes()), None);
    }

    #[test]
    fn time_alone_moderates_and_without_it_nothing_does() {
        let read = |packets: u32, usecs: u32| {
            let mut data = packets.to_le_bytes().to_vec();
            data.extend(usecs.to_le_bytes());
            read_coalesce(&data).unwrap()
        };
        let only_time = read(0, 50);
        assert!(!only_time.is_off());
        assert_eq!(only_time.max_delay, Duration::from_micros(50));
        assert_eq!(read(8, 50).max_events, 8);
        assert!(read(0, 0).is_off() && read(8, 0).is_off() && read(1, 50).is_off());
        assert_eq!(read_coalesce(&[0; 7]), None);
    }

    #[test]
    fn a_table_too_long_lets_all_pass() {
        let count = u32::try_from(TABLE).unwrap() + 1;
        let mut data = count.to_le_bytes().to_vec();
        data.resize(4 + 6 * (TABLE + 1), 2);
        let (table, _) = read_table(&data).unwrap();
        assert!(table.overflow && table.entries.is_empty());
    }
}
