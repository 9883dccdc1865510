//! Khronos' validation layers under the programs that call Vulkan: one message, and the program ends.
//!
//! The layer is asked for by environment variables, which the loader reads, and told by a file what it is to do: check
//! synchronization, too; write each message, with nothing left out; and then break (SIGTRAP). So nobody has to look for
//! messages in what a program prints.

use std::ffi::OsString;
use std::path::Path;

/// The variable by which the loader is asked for layers. Empty, it asks for none.
pub const LAYERS: &str = "VK_INSTANCE_LAYERS";

/// The layer.
pub const NAME: &str = "VK_LAYER_KHRONOS_validation";

/// The package that has it, of Debian and Ubuntu.
pub const PACKAGE: &str = "vulkan-validationlayers";

/// Where its manifest lies, from one of the loader's folders on.
pub const MANIFEST: &str = "explicit_layer.d/VkLayer_khronos_validation.json";

/// The file's usual name.
pub const SETTINGS: &str = "vk_layer_settings.txt";

/// Messages of Debian 12's layer (1.3.239) that are wrong, by names that later layers do not use any more:
/// - an external family and `VK_QUEUE_FAMILY_IGNORED` on a buffer that families share, which
///   VUID-VkBufferMemoryBarrier-None-09049 to -09051 allow;
/// - the layout of an image that was acquired from outside in the layout that it keeps, with synchronization2 enabled: the
///   layer leaves out such barriers and takes the image to be in the layout of its creation.
const WRONG: &str = "UNASSIGNED-CoreValidation-VkBufferMemoryBarrier-sharing-mode-exclusive-same-family,\
                     UNASSIGNED-CoreValidation-DrawState-InvalidImageLayout";

/// What the file says: messages go to `log`, a path or "stdout". Each setting by its name of today and, where it had another
/// one, of Debian 12's layer.
pub fn settings(log: &str) -> String {
    format!(
        "khronos_validation.debug_action = VK_DBG_LAYER_ACTION_LOG_MSG,VK_DBG_LAYER_ACTION_BREAK\n\
         khronos_validation.report_flags = error,warn,perf\n\
         khronos_validation.log_filename = {log}\n\
         khronos_validation.validate_sync = true\n\
         khronos_validation.enables = VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT\n\
         khronos_validation.message_id_filter = {WRONG}\n"
    )
}

/// Where a guest's programs write messages: a file of its own, for what a test prints is not what decides about it.
pub const LOG_IN_GUEST: &str = "/run/validation.log";

/// What a program is started with, where its settings lie at `settings`.
pub fn environment(settings: &Path) -> [(&'static str, OsString); 2] {
    [(LAYERS, NAME.into()), ("VK_LAYER_SETTINGS_PATH", settings.into())]
}

/// What it is started with beside that, where our layer's manifest lies in `layers` and is to pretend that.
pub fn pretending(what: &str, layers: &Path) -> [(&'static str, OsString); 3] {
    [
        (LAYERS, format!("{NAME}:{}", peervram_lab_layer::NAME).into()),
        ("VK_LAYER_PATH", peervram_lab_layer::layer_path(layers)),
        (peervram_lab_layer::VARIABLE, what.into()),
    ]
}
