//! The trees of the shapes.

use crate::machine::tree::{
    Node, RootBus, acs_port, chipset, chipset_to_conventional, conventional, express_to_conventional,
    function, port, root_bus, root_port, switch,
};

const ONE: &[Node] = &[function(0, 0)];
const TWO: &[Node] = &[function(0, 0), function(0, 1)];

/// Root ports, two of them in one slot.
pub(super) const PORTS: &[RootBus] = &[root_bus(
    0x00,
    &[
        root_port(2, 0, ONE),
        root_port(3, 0, TWO),
        root_port(4, 0, ONE),
        root_port(5, 0, ONE),
        root_port(5, 1, ONE),
    ],
)];

/// A switch without ACS, and a function beside it.
pub(super) const SWITCH: &[RootBus] = &[root_bus(
    0x00,
    &[root_port(2, 0, &[switch(&[port(0, ONE), port(1, TWO), port(2, ONE)])]), root_port(3, 0, ONE)],
)];

/// That tree with ACS.
pub(super) const ACS_SWITCH: &[RootBus] = &[root_bus(
    0x00,
    &[
        root_port(2, 0, &[switch(&[acs_port(0, ONE), acs_port(1, ONE), acs_port(2, ONE), acs_port(3, TWO)])]),
        root_port(3, 0, ONE),
    ],
)];

/// A switch with a free slot, and a card beside it.
pub(super) const FREE_SLOT: &[RootBus] =
    &[root_bus(0x00, &[root_port(2, 0, &[switch(&[port(0, ONE), port(1, &[])])]), root_port(3, 0, ONE)])];

/// The same with the card in the slot.
pub(super) const FILLED_SLOT: &[RootBus] =
    &[root_bus(0x00, &[root_port(2, 0, &[switch(&[port(0, ONE), port(1, ONE)])]), root_port(3, 0, &[])])];

/// Two switches below one, with ACS where the kernel's way down is not the same for all.
pub(super) const NESTED: &[RootBus] = &[root_bus(
    0x00,
    &[root_port(
        2,
        0,
        &[switch(&[
            acs_port(0, &[switch(&[acs_port(0, ONE), acs_port(1, ONE)])]),
            acs_port(1, ONE),
            port(2, &[switch(&[port(0, ONE), acs_port(1, ONE)])]),
        ])],
    )],
)];

/// Host bridges that the kernel's list does not have, one of them with nothing to look it up by.
pub(super) const HOSTS: &[RootBus] = &[
    root_bus(0x00, &[root_port(2, 0, ONE)]),
    root_bus(0x40, &[root_port(0, 0, ONE), root_port(1, 0, &[switch(&[port(0, ONE), port(1, ONE)])])]),
    root_bus(0x60, &[chipset_to_conventional(1, &[function(1, 0)]), root_port(2, 0, ONE)]),
];

/// Host bridges that it has: Intel's Skylake-E, and two of NVIDIA's CPUs, known by a device at 00.0 and by a
/// root port.
pub(super) const TRUSTED_HOSTS: &[RootBus] = &[
    root_bus(0x00, &[root_port(2, 0, ONE)]),
    root_bus(0x40, &[root_port(0, 0, ONE).taken_for(0x8086, 0x2030), root_port(1, 0, TWO)]),
    root_bus(
        0x60,
        &[chipset_to_conventional(0, &[function(1, 0)]).taken_for(0x10de, 0x2f95), root_port(1, 0, ONE)],
    ),
    root_bus(0x80, &[root_port(1, 0, ONE).taken_for(0x10de, 0x2f96), root_port(2, 0, ONE)]),
];

/// Host bridges that it has with `REQ_SAME_HOST_BRIDGE`, and one (Google's) without.
pub(super) const SAME_HOST: &[RootBus] = &[
    root_bus(0x00, &[root_port(2, 0, ONE)]),
    root_bus(0x40, &[root_port(0, 0, ONE).taken_for(0x8086, 0x3c00), root_port(1, 0, ONE)]),
    root_bus(0x60, &[root_port(0, 0, ONE).taken_for(0x8086, 0x2f01), root_port(1, 0, ONE)]),
    root_bus(0x80, &[root_port(0, 0, ONE).taken_for(0x1ae0, 0x0042), root_port(1, 0, ONE)]),
];

/// Devices of its list that are not where it looks.
pub(super) const NOT_FIRST: &[RootBus] = &[
    root_bus(0x00, &[root_port(2, 0, ONE).taken_for(0x8086, 0x2020)]),
    root_bus(
        0x40,
        &[chipset_to_conventional(1, &[function(1, 0)]).taken_for(0x1ae0, 0x0042), root_port(2, 0, ONE)],
    ),
    root_bus(0x60, &[root_port(0, 0, ONE), root_port(1, 0, ONE).taken_for(0x8086, 0x2020)]),
];

/// The chipset is on the list, with `REQ_SAME_HOST_BRIDGE`; beside it a host bridge that is without.
pub(super) const CHIPSET: &[RootBus] = &[
    root_bus(
        0x00,
        &[
            chipset().taken_for(0x8086, 0x3c01),
            root_port(2, 0, &[switch(&[acs_port(0, ONE), acs_port(1, ONE)])]),
            root_port(3, 0, TWO),
            function(4, 0),
        ],
    ),
    root_bus(0x40, &[root_port(0, 0, ONE).taken_for(0x8086, 0x09a2)]),
];

/// Conventional bridges, one below the other, by PCI Express and by the chipset.
pub(super) const CONVENTIONAL: &[RootBus] = &[root_bus(
    0x00,
    &[
        root_port(
            2,
            0,
            &[express_to_conventional(
                0,
                &[function(1, 0), function(2, 0), conventional(3, &[function(1, 0), function(2, 0)])],
            )],
        ),
        chipset_to_conventional(
            4,
            &[conventional(1, &[function(1, 0), function(1, 1)]), conventional(2, &[function(1, 0)])],
        ),
        root_port(5, 0, ONE),
    ],
)];

/// Functions on the root bus.
pub(super) const INTEGRATED: &[RootBus] = &[root_bus(
    0x00,
    &[
        root_port(2, 0, ONE),
        function(4, 0),
        function(5, 0),
        function(6, 0),
        function(6, 1),
        chipset_to_conventional(7, &[function(1, 0)]),
    ],
)];

/// A tree with one of every kind of bridge.
pub(super) const MIXED: &[RootBus] = &[
    root_bus(
        0x00,
        &[
            root_port(
                2,
                0,
                &[switch(&[
                    acs_port(0, &[express_to_conventional(0, &[function(1, 0), function(2, 0)])]),
                    acs_port(1, &[switch(&[acs_port(0, ONE), port(1, ONE)])]),
                    port(2, ONE),
                ])],
            ),
            root_port(3, 0, ONE),
            root_port(3, 1, ONE),
            function(6, 0),
        ],
    ),
    root_bus(0x40, &[root_port(0, 0, &[switch(&[port(0, ONE), acs_port(1, ONE)])])]),
];

/// A host bridge of NVIDIA's CPUs on the kernel's list, with a switch and a function beside it.
pub(super) const LISTED_SWITCH: &[RootBus] = &[root_bus(
    0x00,
    &[
        chipset().taken_for(0x10de, 0x2f95),
        root_port(2, 0, &[switch(&[acs_port(0, ONE), acs_port(1, ONE), port(2, ONE)])]),
        root_port(3, 0, TWO),
    ],
)];

/// PCI domains of a machine without ACPI: QEMU's own host bridge, which no list has, and two of NVIDIA's CPUs that are on the
/// kernel's.
pub(super) const DOMAINS: &[RootBus] = &[
    root_bus(0x00, &[root_port(2, 0, ONE), root_port(3, 0, &[switch(&[port(0, ONE), port(1, ONE)])])]),
    root_bus(0x40, &[root_port(0, 0, ONE).taken_for(0x10de, 0x2f96), root_port(1, 0, TWO)]),
    root_bus(
        0x60,
        &[root_port(0, 0, &[switch(&[acs_port(0, ONE), port(1, ONE)])]).taken_for(0x10de, 0x2f97)],
    ),
];

/// As on a machine with GH200s: a PCI domain for each root port of the CPU (10de:22b1, which is not on the kernel's list), and one
/// device below it, or a switch.
pub(super) const GRACE_HOPPER: &[RootBus] = &[
    root_bus(0x00, &[chipset().taken_for(0x10de, 0x22b1), root_port(2, 0, ONE)]),
    root_bus(0x20, &[root_port(0, 0, &[switch(&[port(0, ONE), port(1, ONE)])]).taken_for(0x10de, 0x22b1)]),
    root_bus(0x40, &[root_port(0, 0, ONE).taken_for(0x10de, 0x22b1)]),
    root_bus(0x60, &[root_port(0, 0, ONE).taken_for(0x10de, 0x22b1)]),
];
