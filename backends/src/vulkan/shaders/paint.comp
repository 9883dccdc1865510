// A duotone of an XRGB8888 picture, in place: posterised a little, lit by rings, dark at the edges.
//
// Integers only, so that the CPU's version in `paint.rs` gives the same bytes; keep them alike,
// line by line. Nothing overflows for pictures of up to 32768 x 32768.
//
// Compiled by Debian's glslang-tools, in this folder:
//   glslangValidator --target-env vulkan1.1 -o paint.spv paint.comp
#version 450

layout(local_size_x = 16, local_size_y = 16) in;

layout(std430, set = 0, binding = 0) buffer Pixels { uint pixels[]; };

layout(push_constant) uniform Picture {
    uint first_word;   // where row `first_row` begins in the bound words
    uint width;
    uint height;
    uint stride_words;
    uint first_row;    // a large picture is painted in bands of rows
    uint row_count;
    uint parameter;    // bits 0 to 7: where the rings are; bits 8 and 9: which two tones
};

const uint DARK[4] = uint[](0x1b1464u, 0x0b3d2eu, 0x3a0c3au, 0x10002bu);
const uint BRIGHT[4] = uint[](0xffd8a8u, 0xf6f3c5u, 0xff9e80u, 0x7df9ffu);

// The integer square root, bit by bit.
uint root(uint square) {
    uint result = 0;
    for (uint bit = 0x8000u; bit > 0; bit /= 2) {
        uint trial = result + bit;
        if (trial * trial <= square) {
            result = trial;
        }
    }
    return result;
}

uint channel(uint colour, uint shift) {
    return (colour >> shift) & 255u;
}

void main() {
    uint x = gl_GlobalInvocationID.x;
    uint row = gl_GlobalInvocationID.y;
    if (x >= width || row >= row_count) {
        return;
    }
    uint y = first_row + row;
    uint index = first_word + row * stride_words + x;
    uint pixel = pixels[index];

    uint luma = (77 * channel(pixel, 16) + 150 * channel(pixel, 8) + 29 * channel(pixel, 0)) >> 8;
    uint contrast = min((max(luma, 43) - 43) * 3 / 2, 255);
    uint tone = (contrast + ((contrast * 6) >> 8) * 51) / 2;

    // Distances from the middle in half pixels; `reach` is 1024 in the corners.
    uint dx = 2 * x + 1 > width ? 2 * x + 1 - width : width - 2 * x - 1;
    uint dy = 2 * y + 1 > height ? 2 * y + 1 - height : height - 2 * y - 1;
    uint reach = root(dx * dx + dy * dy) * 1024 / max(root(width * width + height * height), 1);

    uint wave = (reach + (parameter & 255u)) & 127u;
    uint ring = wave < 64 ? wave : 127 - wave;
    uint shade = (224 + ring / 2) * (256 - reach * reach / 8192) >> 8;

    uint dark = DARK[(parameter >> 8) & 3u];
    uint bright = BRIGHT[(parameter >> 8) & 3u];
    uint painted = pixel & 0xff000000u;
    for (uint shift = 0; shift < 24; shift += 8) {
        uint mixed = (channel(dark, shift) * (255 - tone) + channel(bright, shift) * tone) / 255;
        painted |= (mixed * shade / 255) << shift;
    }
    pixels[index] = painted;
}
