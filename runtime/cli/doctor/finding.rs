//! `Finding` and `Step`: what the doctor concludes, and what it asks for.

use serde::Serialize;

/// Where on the page a finding stands, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Section {
    Kernel,
    Iommu,
    Devices,
    Bars,
    Permissions,
    Vulkan,
    Pairs,
    Broker,
}

impl Section {
    pub const ALL: [Self; 8] = [
        Self::Kernel,
        Self::Iommu,
        Self::Devices,
        Self::Bars,
        Self::Permissions,
        Self::Vulkan,
        Self::Pairs,
        Self::Broker,
    ];

    pub fn title(self) -> &'static str {
        match self {
            Self::Kernel => "Kernel",
            Self::Iommu => "IOMMU",
            Self::Devices => "Devices, their drivers and groups",
            Self::Bars => "Resizable BAR and links",
            Self::Permissions => "Permissions",
            Self::Vulkan => "Vulkan",
            Self::Pairs => "Who can lend to whom",
            Self::Broker => "Lending to other processes",
        }
    }
}

/// What a finding means for lending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// As it should be.
    Fine,
    /// Could not be seen.
    Unknown,
    /// Works, and could be better.
    Hint,
    /// Something cannot work because of it.
    InTheWay,
}

/// What was seen, and what it means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of finding it is; stable, for programs.
    pub code: &'static str,
    pub section: Section,
    pub weight: Severity,
    pub seen: String,
    /// Why it matters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<Step>,
}

impl Finding {
    pub fn new(code: &'static str, section: Section, weight: Severity, seen: impl Into<String>) -> Self {
        Self { code, section, weight, seen: seen.into(), why: None, step: None }
    }

    pub fn why(self, why: impl Into<String>) -> Self {
        Self { why: Some(why.into()), ..self }
    }

    pub fn step(self, step: Step) -> Self {
        Self { step: Some(step), ..self }
    }
}

/// When a step's turn is. What others hang on comes first: a device is bound before its BAR is resized, and a
/// kernel that exports comes before everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepOrder {
    LookAtTheHost,
    Kernel,
    KernelOptions,
    Iommu,
    Revive,
    Neighbours,
    Bind,
    ResizeBar,
    Permissions,
    ImportingDriver,
    Slots,
    Vulkan,
    NewerKernel,
    Memlock,
    LookAsRoot,
    Try,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    pub turn: StepOrder,
    pub what: String,
    /// To be pasted, in this order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub commands: Vec<String>,
}

impl Step {
    pub fn new(turn: StepOrder, what: impl Into<String>) -> Self {
        Self { turn, what: what.into(), commands: Vec::new() }
    }

    pub fn command(mut self, command: impl Into<String>) -> Self {
        self.commands.push(command.into());
        self
    }
}
