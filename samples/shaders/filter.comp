// An XRGB8888 picture as an old screen would show it, in place: amber, with dark lines between the rows.
#version 450

layout(local_size_x = 64) in;

layout(std430, set = 0, binding = 0) buffer Pixels { uint pixels[]; };

layout(push_constant) uniform Picture {
    uint width;
    uint count;
};

void main() {
    uint at = gl_GlobalInvocationID.x;
    if (at >= count) {
        return;
    }
    uint pixel = pixels[at];
    uint luma = (77u * (pixel >> 16 & 255u) + 150u * (pixel >> 8 & 255u) + 29u * (pixel & 255u)) >> 8;
    uint light = (at / width) % 4u == 3u ? luma / 2u : luma;
    pixels[at] = light << 16 | (light * 180u / 255u) << 8 | light * 40u / 255u;
}
