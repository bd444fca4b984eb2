// The activations of float32 values, a vector at a time. Included into an unnamed namespace after a Vec.
#pragma once

// x = f(x)
template <typename F>
inline void map(float* x, int64_t count, F f) {
    int64_t i = 0;
    for (; i + Vec::kLanes <= count; i += Vec::kLanes) f(Vec::load(x + i)).store(x + i);
    if (i == count) return;
    float room[Vec::kLanes] = {};
    std::memcpy(room, x + i, (count - i) * sizeof(float));
    f(Vec::load(room)).store(room);
    std::memcpy(x + i, room, (count - i) * sizeof(float));
}

// e^x to 2 units of 2^-24 in [-87, 87], which it is clamped to: e^x = 2^n e^r, |r| <= ln 2 / 2, with the Taylor
// polynomial of degree 7 (its remainder is below 2^-27). Not a number stays.
//
// Not a loop over floats: compilers see that all beyond the clamp is constant, and multiply by what the sigmoid is
// there, 2^-125, in all lanes, which is slow as microcode where it makes a subnormal number (60 ns a vector, 6
// without).
inline Vec exponential(Vec x) {
    x = Vec::least(Vec::all(87.0f), Vec::most(Vec::all(-87.0f), x));
    // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
    const Vec shift = Vec::all(12582912.0f), shifted = Vec::fma(x, Vec::all(1.44269504f), shift);
    const Vec n = Vec::difference(shifted, shift);
    const Vec r = Vec::fma(n, Vec::all(2.12194440e-4f), Vec::fma(n, Vec::all(-0.693359375f), x));
    Vec p = Vec::all(1.98412698e-4f);
    for (const float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f})
        p = Vec::fma(p, r, Vec::all(c));
    return Vec::product(p, Vec::power_of_two(shifted));
}

// x / (1 + e^-y)
inline Vec times_sigmoid(Vec x, Vec y) {
    const Vec one = Vec::all(1.0f);
    return Vec::quotient(x, Vec::fma(one, exponential(Vec::difference(Vec::zero(), y)), one));
}

inline Vec gelu(Vec x) {
    float lanes[Vec::kLanes];
    x.store(lanes);
    for (float& lane : lanes) lane = 0.5f * lane * (1.0f + ::erff(lane * 0.707106781f));
    return Vec::load(lanes);
}

// (1 + tanh u) / 2 = 1 / (1 + e^-2u)
inline Vec gelu_tanh(Vec x) {
    const Vec u = Vec::fma(Vec::product(Vec::product(x, x), x), Vec::all(0.044715f), x);
    return times_sigmoid(x, Vec::product(u, Vec::all(1.595769122f)));
}

// body(f) with f the function of a vector that an activation is.
template <typename Body>
inline void with_activation(Activation activation, Body body) {
    switch (activation) {
        case Activation::kNone:
            return body([](Vec x) { return x; });
        case Activation::kRelu:
            return body([](Vec x) { return Vec::most(Vec::zero(), x); });
        case Activation::kGelu:
            return body([](Vec x) { return gelu(x); });
        case Activation::kGeluTanh:
            return body([](Vec x) { return gelu_tanh(x); });
        case Activation::kSilu:
            return body([](Vec x) { return times_sigmoid(x, x); });
        case Activation::kRelu2:
            return body([](Vec x) {
                const Vec kept = Vec::most(Vec::zero(), x);
                return Vec::product(kept, kept);
            });
    }
}
