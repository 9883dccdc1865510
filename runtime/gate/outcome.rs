//! `Outcome`: how an access ended.

use peervram_backends::{Error, Kind};

/// How an access ended. Whoever drops it unseen does not know whether bytes were torn:
///
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # use peervram::{Access, Result, backends::Importer};
/// fn unseen<I: Importer>(access: Access<'_, I>) -> Result<()> {
///     access.finish();
///     Ok(())
/// }
/// ```
/// ```
/// #![deny(unused_must_use)]
/// # use peervram::{Access, Result, backends::Importer};
/// fn seen<I: Importer>(access: Access<'_, I>) -> Result<()> {
///     access.finish().check()
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "an access that was torn was worth nothing"]
#[non_exhaustive]
pub enum Outcome {
    /// The memory stayed the same from entering to finishing.
    Ok,
    /// It was taken back meanwhile: what was read or written is worth nothing.
    Torn {
        /// The generation of the memory now.
        generation: u64,
    },
    /// The memory stayed the same, but what the importer wrote could not be copied to it, or only a part (of a
    /// [staged](crate::Path::Staged) path), or its owner could not be made to see it
    /// ([`Owner::invalidate`](peervram_backends::Owner::invalidate)). The log says why. What is there is old,
    /// new, or some of each.
    NotCopiedBack,
}

impl Outcome {
    /// Nothing, or why the access was worth nothing, for `?`.
    ///
    /// # Errors
    /// [`Kind::Revoked`] where it was torn, [`Kind::Unverified`] where what was written is not known to be there.
    pub fn check(self) -> Result<(), Error> {
        const TRIED: &str = "finish an access to lent memory";
        match self {
            Self::Ok => Ok(()),
            Self::Torn { generation } => {
                let why =
                    format!("the memory was taken back meanwhile, and is of generation {generation} now");
                let error = Error::new(Kind::Revoked, TRIED, why);
                Err(error.next("do it again: what was read or written is worth nothing"))
            }
            Self::NotCopiedBack => {
                let why = "what was written could not be brought to where it belongs, or only a part";
                Err(Error::new(Kind::Unverified, TRIED, why).next("the log says why; write it again"))
            }
        }
    }

    /// The same, unless what was written is not where it belongs. What was torn is no better for being there.
    pub(crate) fn unless_lost(self, is_there: bool) -> Self {
        if self == Self::Ok && !is_there { Self::NotCopiedBack } else { self }
    }
}
