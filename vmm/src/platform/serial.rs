//! COM1: vm-superio's 16550 with its interrupt on an IOAPIC pin and back-pressure on its input.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, TryLockError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::PanicWatch;
use crate::ioapic::IoApic;
use crate::layout;

/// Register offsets and bits (National PC16550D data sheet, table II).
const INTERRUPT_ENABLE: u8 = 1;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const ENABLE_RECEIVED_DATA: u8 = 1 << 0;
const DIVISOR_LATCH: u8 = 1 << 7;
const LOOP: u8 = 1 << 4;

/// Output that also goes past the panic watch.
struct Output {
    out: Box<dyn Write + Send>,
    watch: Arc<PanicWatch>,
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        data.iter().for_each(|byte| self.watch.byte(*byte));
        self.out.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The UART's interrupt output as edges on its pin.
struct Pin(Arc<IoApic>);

impl Trigger for Pin {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse(layout::COM1_PIN);
        Ok(())
    }
}

/// Tells the input side when there is room again.
struct Room(EventFd);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter says the same.
        let _ = self.0.write(1);
    }
}

/// COM1.
///
/// The guest gets no input before its driver listens, that is, before it enables the received-data
/// interrupt: drivers empty the FIFO when they start, and what was typed ahead would be lost.
pub struct Serial {
    /// A vCPU holds it while it waits for a host that takes no output.
    state: Mutex<State>,
    /// Input found the port busy and is to be told when it no longer is.
    shut_out: AtomicBool,
    room: EventFd,
}

struct State {
    uart: Uart<Pin, Room, Output>,
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    /// Input was offered while the guest did not listen.
    refused: bool,
}

impl State {
    fn write(&mut self, offset: u8, value: u8) -> Result<(), vm_superio::serial::Error<io::Error>> {
        match offset {
            INTERRUPT_ENABLE if self.line_control & DIVISOR_LATCH == 0 => {
                self.interrupt_enable = value;
            }
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => self.modem_control = value,
            _ => {}
        }
        self.uart.write(offset, value)
    }

    fn listens(&self) -> bool {
        self.interrupt_enable & ENABLE_RECEIVED_DATA != 0 && self.modem_control & LOOP == 0
    }
}

impl Serial {
    /// A port that writes to `out` what the guest sends.
    ///
    /// # Errors
    ///
    /// No file descriptors are left.
    pub fn new(
        ioapic: Arc<IoApic>,
        out: Box<dyn Write + Send>,
        watch: Arc<PanicWatch>,
    ) -> io::Result<Serial> {
        let room = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let events = Room(room.try_clone()?);
        Ok(Serial {
            state: Mutex::new(State {
                uart: Uart::with_events(Pin(ioapic), events, Output { out, watch }),
                interrupt_enable: 0,
                line_control: 0,
                modem_control: 0,
                refused: false,
            }),
            shut_out: AtomicBool::new(false),
            room,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_state(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// A vCPU is done with the port.
    fn let_in(&self) {
        // Pairs with the fence in `input`: it gets the lock, or we see its mark.
        fence(Ordering::SeqCst);
        if self.shut_out.load(Ordering::Relaxed) && self.shut_out.swap(false, Ordering::Relaxed) {
            // A full counter says the same.
            let _ = self.room.write(1);
        }
    }

    /// A load from register `offset`, 0 to 7.
    pub fn read(&self, offset: u8) -> u8 {
        let value = self.state().uart.read(offset);
        self.let_in();
        value
    }

    /// A store to register `offset`, 0 to 7. Output that the host does not take is lost.
    pub fn write(&self, offset: u8, value: u8) {
        let mut state = self.state();
        if let Err(error) = state.write(offset, value) {
            static WARNED: Once = Once::new();
            WARNED.call_once(|| tracing::warn!(%error, "the serial line's output is lost"));
        }
        if state.refused && state.listens() {
            state.refused = false;
            // A full counter says the same.
            let _ = self.room.write(1);
        }
        drop(state);
        self.let_in();
    }

    /// Gives the guest input and says how many bytes of it its FIFO had room for. Never waits: there
    /// is no room while a vCPU waits for the host to take output.
    pub fn input(&self, data: &[u8]) -> usize {
        if data.is_empty() {
            return 0;
        }
        let state = self.try_state().or_else(|| {
            self.shut_out.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            self.try_state()
        });
        let Some(mut state) = state else { return 0 };
        if !state.listens() {
            state.refused = true;
            return 0;
        }
        // The only error is a full FIFO: the interrupt never fails.
        state.uart.enqueue_raw_bytes(data).unwrap_or(0)
    }

    /// Signalled when [`Serial::input`] may take more after it took less than it was given: the guest
    /// has read all, listens, or is done with its output. Non-blocking.
    pub fn room(&self) -> &EventFd {
        &self.room
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use iommu::{MsiLine, MsiMessage};

    use super::*;

    /// A host that takes a byte when it is told to.
    struct Stuck {
        begun: mpsc::Sender<()>,
        go: mpsc::Receiver<()>,
    }

    impl Write for Stuck {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.begun.send(()).unwrap();
            self.go.recv().unwrap();
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The main loop gives input, and it must stay able to end the machine.
    #[test]
    fn input_does_not_wait_for_output() {
        let (begun, started) = mpsc::channel();
        let (release, go) = mpsc::channel();
        let ioapic = Arc::new(IoApic::new(Vec::new()));
        let out = Box::new(Stuck { begun, go });
        let serial = Arc::new(Serial::new(ioapic, out, Arc::default()).unwrap());
        serial.write(1, 1); // Interrupt on received data.
        let port = Arc::clone(&serial);
        let vcpu = std::thread::spawn(move || port.write(0, b'a'));
        started.recv().unwrap();
        let (answer, taken) = mpsc::channel();
        let port = Arc::clone(&serial);
        let main_loop = std::thread::spawn(move || answer.send(port.input(b"x")));
        let taken = taken.recv_timeout(Duration::from_secs(20));
        release.send(()).unwrap();
        vcpu.join().unwrap();
        main_loop.join().unwrap().unwrap();
        assert_eq!(taken, Ok(0), "waited for the vCPU");
        assert_eq!(serial.room().read().unwrap(), 1, "not told to try again");
        assert_eq!(serial.input(b"x"), 1);
    }

    #[derive(Default)]
    struct Counter(Mutex<u32>);

    impl MsiLine for Counter {
        fn retarget(&self, _message: MsiMessage) -> io::Result<()> {
            Ok(())
        }
        fn fire(&self) {
            *self.0.lock().unwrap() += 1;
        }
    }

    #[test]
    fn input_waits_for_room_and_raises_the_pin() {
        let counter = Arc::new(Counter::default());
        let lines = (0..24)
            .map(|_| Arc::clone(&counter) as Arc<dyn MsiLine>)
            .collect();
        let ioapic = Arc::new(IoApic::new(lines));
        ioapic.write(0, &[0x18]);
        ioapic.write(0x10, &0x31u32.to_le_bytes());
        let serial = Serial::new(ioapic, Box::new(io::sink()), Arc::default()).unwrap();
        let data = [b'x'; 100];
        assert_eq!(serial.input(&data), 0, "nobody listens");
        serial.write(1, 1); // Interrupt on received data.
        assert_eq!(serial.room().read().unwrap(), 1);
        let first = serial.input(&data);
        assert!(first > 0 && first < data.len());
        assert_eq!(*counter.0.lock().unwrap(), 1);
        assert_eq!(serial.input(&data), 0);
        assert!(serial.room().read().is_err(), "no room yet");
        for _ in 0..first {
            assert_eq!(serial.read(0), b'x');
        }
        assert_eq!(serial.room().read().unwrap(), 1);
        assert!(serial.input(&data) > 0);
    }
}
