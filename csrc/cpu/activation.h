// The activations of a block of float32 values, in loops that compilers turn into vectors. Included into an unnamed
// namespace, see values.h.
#pragma once

// e^x to 2 units of 2^-24 in the normal range, which it is clamped to: e^x = 2^n e^r, |r| <= ln 2 / 2, with the Taylor
// polynomial of degree 7 (its remainder is below 2^-27).
inline float exponential(float x) {
    x = x > -87.0f ? x : -87.0f;
    x = x < 88.0f ? x : 88.0f;
    // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * from_bits((to_bits(shifted) - 0x4b400000u + 127u) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline void activate(Activation activation, float* x, int64_t count) {
    switch (activation) {
        case Activation::kNone:
            break;
        case Activation::kRelu:
            for (int64_t i = 0; i < count; ++i) x[i] = x[i] < 0 ? 0 : x[i];
            break;
        case Activation::kGelu:
            for (int64_t i = 0; i < count; ++i) x[i] = 0.5f * x[i] * (1.0f + ::erff(x[i] * 0.707106781f));
            break;
        case Activation::kGeluTanh:
            // (1 + tanh u) / 2 = sigmoid(2 u)
            for (int64_t i = 0; i < count; ++i)
                x[i] = x[i] * sigmoid(1.595769122f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
            break;
        case Activation::kSilu:
            for (int64_t i = 0; i < count; ++i) x[i] = x[i] * sigmoid(x[i]);
            break;
    }
}
