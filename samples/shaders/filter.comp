// An XRGB8888 picture as an old screen would show it, in place: amber, with dark lines between the rows.
#version 450

layout(local_size_x = 8, local_size_y = 8) in;

layout(set = 0, binding = 0, r32ui) uniform uimage2D pixels;

void main() {
    ivec2 at = ivec2(gl_GlobalInvocationID.xy);
    ivec2 size = imageSize(pixels);
    if (at.x >= size.x || at.y >= size.y) {
        return;
    }
    uint pixel = imageLoad(pixels, at).x;
    uint luma = (77u * (pixel >> 16 & 255u) + 150u * (pixel >> 8 & 255u) + 29u * (pixel & 255u)) >> 8;
    uint light = at.y % 4 == 3 ? luma / 2u : luma;
    uint amber = light << 16 | (light * 180u / 255u) << 8 | light * 40u / 255u;
    imageStore(pixels, at, uvec4(amber, 0u, 0u, 0u));
}
