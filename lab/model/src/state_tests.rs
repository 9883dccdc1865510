//! The state machine, by example and by random sequences.

use super::*;
use crate::registers::engine;
use proptest::prelude::*;

const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x5678,
    bar2_bytes: 16 << 20,
    vram_bytes: 16 << 20,
    bar4_bytes: 0,
    vendor_word: 0,
    is_coherent: false,
    has_cxl: false,
};
const T0: Now = Now::ZERO;

fn read(state: &mut State, at: u32) -> u32 {
    let mut bytes = [0; 4];
    state.read_registers(T0, at, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn write(state: &mut State, at: u32, value: u32) {
    state.write_registers(T0, at, &value.to_le_bytes());
}

fn enabled() -> State {
    let mut state = State::new(IDENTITY);
    write(&mut state, map::COPY_ENGINE + engine::RING_ADDRESS_LOW, 0x1000);
    write(&mut state, map::COPY_ENGINE + engine::RING_ENTRIES, 4);
    write(&mut state, map::COPY_ENGINE + engine::CONTROL, engine::CONTROL_ENABLE);
    state
}

#[test]
fn a_doorbell_takes_effect_when_it_is_published_and_not_before() {
    let mut state = enabled();
    write(&mut state, map::COPY_ENGINE + engine::TAIL, 1);
    assert_eq!(state.next(EngineKind::Copy, T0), None);
    assert_eq!(read(&mut state, map::COPY_ENGINE + engine::STATUS), engine::STATUS_BUSY);
    assert!(state.publish());
    let next = state.next(EngineKind::Copy, T0).unwrap();
    assert_eq!(next.descriptor_offset, 0x1000);
    state.finish(next.ticket, 0x1_0000_0002, false);
    assert_eq!(read(&mut state, map::COPY_ENGINE + engine::FENCE_LOW), 2);
    assert_eq!(read(&mut state, map::COPY_ENGINE + engine::FENCE_HIGH), 1);
    assert_eq!(state.next(EngineKind::Copy, T0), None);
}

#[test]
fn a_ring_that_is_overrun_or_does_not_fit_halts_its_engine() {
    let mut state = enabled();
    write(&mut state, map::COPY_ENGINE + engine::TAIL, 5);
    state.publish();
    assert_eq!(read(&mut state, map::COPY_ENGINE + engine::STATUS), engine::STATUS_HALTED);
    assert_eq!(read(&mut state, map::ERROR_CODE), ErrorCode::Ring as u32);

    for (address, high, entries) in
        [(0x1020, 0, 4), (0, 0, 3), (0, 0, 1), (0, 0, 8192), ((16 << 20) - 64, 0, 2), (0, 1, 4)]
    {
        let mut state = State::new(IDENTITY);
        write(&mut state, map::DRAW_ENGINE + engine::RING_ADDRESS_LOW, address);
        write(&mut state, map::DRAW_ENGINE + engine::RING_ADDRESS_HIGH, high);
        write(&mut state, map::DRAW_ENGINE + engine::RING_ENTRIES, entries);
        write(&mut state, map::DRAW_ENGINE + engine::CONTROL, engine::CONTROL_ENABLE);
        assert_eq!(
            read(&mut state, map::DRAW_ENGINE + engine::STATUS),
            engine::STATUS_HALTED,
            "{address:#x} {entries}"
        );
        assert_eq!(read(&mut state, map::ERROR_DETAIL), 1 << 24);
    }
}

#[test]
fn a_reset_leaves_work_under_way_without_a_say() {
    let mut state = enabled();
    write(&mut state, map::COPY_ENGINE + engine::TAIL, 1);
    state.publish();
    let ticket = state.next(EngineKind::Copy, T0).unwrap().ticket;
    state.reset(T0);
    assert!(!state.is_current(ticket));
    state.finish(ticket, 9, true);
    state.fail(ticket, ErrorCode::DmaFault);
    assert_eq!(read(&mut state, map::COPY_ENGINE + engine::FENCE_LOW), 0);
    assert_eq!(read(&mut state, map::INTERRUPT_STATUS), 0);
    assert_eq!(read(&mut state, map::GENERATION), 1);
}

#[test]
fn a_slow_reset_answers_all_ones_until_it_is_over_and_a_stuck_one_for_ever() {
    let mut state = State::new(IDENTITY);
    state.misbehave(Misbehaviour::SlowReset { ms: 100 });
    state.reset(T0);
    let vendor = |state: &mut State, ms| {
        let mut bytes = [0; 4];
        state.read_configuration(Now::from_millis(ms), 0, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!(vendor(&mut state, 99), u32::MAX);
    assert_eq!(vendor(&mut state, 100), 0x5678_1234);
    state.misbehave(Misbehaviour::StuckReset);
    state.reset(T0);
    assert_eq!(vendor(&mut state, 1 << 40), u32::MAX);
    state.behave();
    assert_eq!(vendor(&mut state, 0), 0x5678_1234);
}

#[test]
fn memory_gets_ready_some_time_after_a_reset_or_never() {
    let mut state = State::new(IDENTITY);
    let ready = |state: &mut State, ms| {
        map::READINESS.map(|at| {
            let mut bytes = [0; 4];
            state.read_registers(Now::from_millis(ms), at, &mut bytes);
            u32::from_le_bytes(bytes)
        })
    };
    let (yes, no) = ([map::READINESS_VALUE; 2], [map::READINESS_NOT_YET; 2]);
    state.misbehave(Misbehaviour::SlowReady { ms: 100 });
    assert_eq!(ready(&mut state, 0), yes, "not before a reset");
    state.reset(Now::from_millis(50));
    assert_eq!((ready(&mut state, 149), ready(&mut state, 150)), (no, yes));
    state.misbehave(Misbehaviour::StuckReady);
    assert_eq!(ready(&mut state, 1 << 40), no);
    state.behave();
    assert_eq!(ready(&mut state, 0), yes);
}

#[test]
fn interrupts_are_raised_only_where_enabled_and_told_in_any_case() {
    let mut state = State::new(IDENTITY);
    state.inject_error();
    assert_eq!(state.take_interrupts(), 0);
    assert_eq!(read(&mut state, map::INTERRUPT_STATUS), 1 << map::VECTOR_ERROR);
    write(&mut state, map::INTERRUPT_ENABLE, u32::MAX);
    state.inject_error();
    assert_eq!(state.take_interrupts(), 1 << map::VECTOR_ERROR);
    write(&mut state, map::INTERRUPT_STATUS, u32::MAX);
    write(&mut state, map::ERROR_CODE, 0);
    assert_eq!(read(&mut state, map::STATUS), map::STATUS_READY);
}

#[test]
fn a_sleeping_or_removed_device_reads_all_ones() {
    let mut state = enabled();
    state.write_configuration(T0, 0x44, &[3]);
    assert_eq!(read(&mut state, map::IDENTITY), u32::MAX);
    state.write_configuration(T0, 0x44, &[0]);
    assert_eq!(read(&mut state, map::COPY_ENGINE + engine::CONTROL), engine::CONTROL_ENABLE, "state is kept");
    state.remove();
    state.reset(T0);
    assert_eq!(read(&mut state, map::IDENTITY), u32::MAX);
    state.insert();
    assert_eq!(read(&mut state, map::IDENTITY), map::IDENTITY_VALUE);
}

#[test]
fn reads_of_any_width_and_alignment_are_pieces_of_words() {
    let mut state = State::new(IDENTITY);
    let mut bytes = [0; 7];
    state.read_registers(T0, 1, &mut bytes);
    assert_eq!(&bytes[..3], b"VRM");
    write(&mut state, map::SCRATCH, 7);
    state.write_registers(T0, map::SCRATCH + 1, &[9; 4]);
    state.write_registers(T0, map::SCRATCH, &[9; 3]);
    assert_eq!(read(&mut state, map::SCRATCH), 7, "only whole aligned words count");
}

#[derive(Debug, Clone)]
enum Step {
    Write(u32, u32),
    Configure(u16, u32),
    Publish,
    Work(bool),
    Misbehave(u8),
    Behave,
    Remove,
    Insert,
    Reset,
    Wait(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let value = prop_oneof![0u32..10, any::<u32>()];
    let register = prop_oneof![0u32..0x40, 0x1000u32..0x1028, 0x1100u32..0x1128].prop_map(|at| at & !3);
    prop_oneof![
        8 => (register, value.clone()).prop_map(|(at, value)| Step::Write(at, value)),
        2 => (0u16..0x160, value).prop_map(|(at, value)| Step::Configure(at, value)),
        4 => Just(Step::Publish),
        6 => any::<bool>().prop_map(Step::Work),
        1 => any::<u8>().prop_map(Step::Misbehave),
        1 => Just(Step::Behave),
        1 => Just(Step::Remove),
        1 => Just(Step::Insert),
        1 => Just(Step::Reset),
        1 => any::<u16>().prop_map(Step::Wait),
    ]
}

proptest! {
    #[test]
    fn no_sequence_breaks_what_always_holds(steps in proptest::collection::vec(step(), 1..200)) {
        let mut state = State::new(IDENTITY);
        let mut now = T0;
        let mut old = None;
        for step in steps {
            let generation = state.generation();
            match step {
                Step::Write(at, value) => state.write_registers(now, at, &value.to_le_bytes()),
                Step::Configure(at, value) => {
                    if state.write_configuration(now, at.into(), &value.to_le_bytes()).reset {
                        state.reset(now);
                    }
                }
                Step::Publish => { state.publish(); }
                Step::Work(good) => {
                    if let Some(next) = state.next(EngineKind::Copy, now) {
                        prop_assert!(state.is_awake(now));
                        prop_assert!(next.descriptor_offset + DESCRIPTOR_BYTES <= IDENTITY.vram_bytes);
                        prop_assert!(state.is_current(next.ticket));
                        if good { state.finish(next.ticket, 1, true) } else { state.fail(next.ticket, ErrorCode::DmaFault) }
                        old = Some((state.generation(), next.ticket));
                    }
                }
                Step::Misbehave(number) => state.misbehave(match number % 4 {
                    0 => Misbehaviour::StuckReset,
                    1 => Misbehaviour::SlowReset { ms: number.into() },
                    2 => Misbehaviour::AllOnes,
                    _ => Misbehaviour::VramLost,
                }),
                Step::Behave => { state.behave(); prop_assert_eq!(state.faults(), Faults::default()); }
                Step::Remove => { state.remove(); prop_assert!(!state.is_present(now)); }
                Step::Insert => state.insert(),
                Step::Reset => state.reset(now),
                Step::Wait(ms) => now += Now::from_millis(ms.into()),
            }
            prop_assert!(state.generation().wrapping_sub(generation) <= 1);
            if let Some((generation, ticket)) = old {
                prop_assert!(generation == state.generation() || !state.is_current(ticket));
            }
            let enabled = state.interrupt_enable;
            prop_assert_eq!(state.take_interrupts() & !((1 << map::VECTORS) - 1), 0);
            prop_assert_eq!(enabled & !((1 << map::VECTORS) - 1), 0);
            for engine in &state.engines {
                prop_assert!(!engine.enabled || engine.tail.wrapping_sub(engine.head) <= engine.ring_entries);
                prop_assert!(!(engine.enabled && engine.halted));
            }
        }
    }
}

#[test]
fn an_engine_has_a_rate_until_a_reset() {
    let mut state = State::new(IDENTITY);
    assert_eq!(state.least_time(u64::MAX), Now::ZERO);
    write(&mut state, map::ENGINE_RATE, 4);
    assert_eq!(state.least_time(1 << 20), Now::from_millis(250));
    state.reset(T0);
    assert_eq!(read(&mut state, map::ENGINE_RATE), 0);
}
