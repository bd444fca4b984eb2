// Attention of one new token a row, over a cache that it joins. Included into an unnamed namespace after product.h and
// activation.h.
#pragma once

// Query heads of one key head that are done together: they share what is loaded of the cache.
constexpr int kGroup = 8;

// The norm of one head.
template <typename D>
inline void normalise(const Attention& op, const D* norm, float* values) {
    const int64_t size = op.head_dim;
    float total = 0;
    for (int64_t i = 0; i < size; ++i) total += values[i] * values[i];
    const float scale = static_cast<float>(1 / ::sqrt(total / static_cast<double>(size) + op.norm_eps));
    for (int64_t i = 0; i < size; ++i) values[i] *= scale * to_float(norm[i]);
}

// The norm and the rotation of one head, in float32; `x` and `out` are different memory.
template <typename D>
inline void place(const Attention& op, const D* x, const D* norm, const D* cos, const D* sin, float* out, float* room) {
    const int64_t size = op.head_dim;
    float* values = cos ? room : out;
    for (int64_t i = 0; i < size; ++i) values[i] = to_float(x[i]);
    if (norm && !(cos && op.rotate_first)) normalise(op, norm, values);
    if (!cos) return;
    const int64_t turned = op.rotary_dim, half = turned / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = values[i], high = values[i + half];
        out[i] = low * to_float(cos[i]) + high * to_float(sin[i]);
        out[i + half] = high * to_float(cos[i + half]) + low * to_float(sin[i + half]);
    }
    for (int64_t i = turned; i < size; ++i) out[i] = values[i];
    if (norm && op.rotate_first) normalise(op, norm, out);
}

// The order of `pack` for a row of floats.
template <typename D>
inline void pack_floats(const float* x, int64_t count, float* out) {
    constexpr int kChunk = Values<D>::kChunk;
    for (int64_t k = 0; k < count; k += kChunk)
        for (int i = 0; i < kChunk; ++i) out[k + position<D>(i)] = k + i < count ? x[k + i] : 0.0f;
}

// out[g][:] = Σ_j p[g][j] v[j][:] + p[g][n] last[:]
template <typename D, int GROUP>
inline void weighted_sum(const float* p, int64_t p_stride, const D* v, int64_t n, const D* last, int64_t size,
                         float* out) {
    constexpr int kChunk = Values<D>::kChunk, kParts = Values<D>::kParts;
    for (int64_t c = 0; c < size; c += kChunk) {
        const int width = static_cast<int>(least(kChunk, size - c));
        Vec sums[GROUP][kParts];
        for (auto& of_head : sums)
            for (Vec& sum : of_head) sum = Vec::zero();
        for (int64_t j = 0; j <= n; ++j) {
            const D* row = (j < n ? v + j * size : last) + c;
            Vec values[kParts];
            if (width == kChunk)
                Values<D>::load(row, values);
            else
                load_first<Floats<D>>(row, width, values);
            for (int g = 0; g < GROUP; ++g) {
                const Vec weight = Vec::all(p[g * p_stride + j]);
                for (int i = 0; i < kParts; ++i) sums[g][i] = Vec::fma(weight, values[i], sums[g][i]);
            }
        }
        for (int g = 0; g < GROUP; ++g) {
            float chunk[kChunk];
            for (int i = 0; i < kParts; ++i) sums[g][i].store(chunk + i * Vec::kLanes);
            for (int i = 0; i < width; ++i) out[g * size + c + i] = chunk[position<D>(i)];
        }
    }
}

// Scores to probabilities, 0 where `valid` is; the last score is the new token's, which sees itself.
inline void softmax(float* scores, int64_t count, float scale, const uint8_t* valid) {
    float largest = scores[count - 1];
    for (int64_t j = 0; j < count - 1; ++j)
        if (!valid || valid[j]) largest = scores[j] > largest ? scores[j] : largest;
    float total = 0;
    map(scores, count,
        [&](Vec v) { return exponential(Vec::product(Vec::difference(v, Vec::all(largest)), Vec::all(scale))); });
    if (valid)
        for (int64_t j = 0; j < count - 1; ++j) scores[j] = valid[j] ? scores[j] : 0.0f;
    for (int64_t j = 0; j < count; ++j) total += scores[j];
    const float inverse = 1 / total;
    for (int64_t j = 0; j < count; ++j) scores[j] *= inverse;
}

template <typename D>
void attend(const Attention& op, int thread, int threads) {
    const int64_t size = op.head_dim, packed = packed_size<Floats<D>>(size), sharing = op.heads / op.key_heads;
    const int64_t n = op.slot - op.first, scores_stride = n + 1;
    // One key head and its queries at a time; one query at a time where that leaves threads idle.
    const int64_t group = op.batch * op.key_heads >= 4 * threads ? least(sharing, kGroup) : 1;
    const int64_t groups = (sharing + group - 1) / group, units = op.batch * op.key_heads * groups;
    const float scale = static_cast<float>(1 / ::sqrt(static_cast<double>(size)));
    float* queries = scratch(group * (packed + scores_stride + size) + 3 * size);
    float* scores = queries + group * packed;
    float* out = scores + group * scores_stride;
    float* head = out + group * size;
    float* room = head + size;
    D* new_key = reinterpret_cast<D*>(room + size);
    const Range range = share(units, 1, thread, threads);
    for (int64_t unit = range.begin; unit < range.end; ++unit) {
        const int64_t b = unit / (op.key_heads * groups), k = unit / groups % op.key_heads;
        const int64_t first_query = unit % groups * group, count = least(group, sharing - first_query);
        D* row = static_cast<D*>(op.rows) + b * op.rows_stride;
        const D *cos = nullptr, *sin = nullptr, *norm = static_cast<const D*>(op.norm);
        if (op.rotary) {
            cos = static_cast<const D*>(op.rotary) + most(op.positions[b], 0) * 2 * op.rotary_dim;
            sin = cos + op.rotary_dim;
        }
        const D* value = row + k * size;
        place(op, row + (op.key_heads + k) * size, norm ? norm + k * size : nullptr, cos, sin, head, room);
        store_row(new_key, head, size);
        D* query_rows = row + (2 * op.key_heads + k * sharing + first_query) * size;
        for (int64_t g = 0; g < count; ++g) {
            const int64_t scale_row = op.key_heads + k * sharing + first_query + g;
            place(op, query_rows + g * size, norm ? norm + scale_row * size : nullptr, cos, sin, head, room);
            pack_floats<D>(head, size, queries + g * packed);
        }
        const int64_t of_head = b * op.batch_stride + k * op.head_stride;
        D* keys = static_cast<D*>(op.keys) + of_head;
        D* values = static_cast<D*>(op.values) + of_head;
        product<Floats<D>>(keys + op.first * size, size, n, size, queries, count, scores, scores_stride, false);
        product<Floats<D>>(new_key, size, 1, size, queries, count, scores + n, scores_stride, false);
        const uint8_t* valid = op.valid ? op.valid + b * op.valid_stride + op.first : nullptr;
        for (int64_t g = 0; g < count; ++g) softmax(scores + g * scores_stride, n + 1, scale, valid);
        const D* seen = values + op.first * size;
        for (int64_t g = 0; g < count;) {
            const float* p = scores + g * scores_stride;
            if (count - g >= 4) {
                weighted_sum<D, 4>(p, scores_stride, seen, n, value, size, out + g * size);
                g += 4;
            } else if (count - g >= 2) {
                weighted_sum<D, 2>(p, scores_stride, seen, n, value, size, out + g * size);
                g += 2;
            } else {
                weighted_sum<D, 1>(p, scores_stride, seen, n, value, size, out + g * size);
                g += 1;
            }
        }
        store_row(query_rows, out, count * size);
        if (first_query == 0) {
            // Others that read this head's cache take the new token from `rows`, as above.
            std::memcpy(keys + op.slot * size, new_key, size * sizeof(D));
            std::memcpy(values + op.slot * size, value, size * sizeof(D));
        }
    }
}
