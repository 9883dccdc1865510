//! drm
