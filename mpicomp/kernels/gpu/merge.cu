// Sums of sparse vectors: many into an array with marks, or two ascending lists into one. mpicomp/kernels/cpu/marks.py
// and merge.py say what is computed.
#include "bits.cuh"

extern "C" __global__ void __launch_bounds__(256) add_marked(
    const u32* places, const T* values, T* sums, i64 room, u64* marks, i64 size) {
    for (i64 i = thread_of_grid(); i < size; i += threads_of_grid()) {
        const u32 place = places[i];
        if (place >= room) continue;
        sums[place] += values[i];
        atomicOr(&marks[place / 64], 1ull << (place % 64));
    }
}

// Set the `count` lowest bits that are not set, a tile of words a block.
extern "C" __global__ void __launch_bounds__(256) mark_first(u64* marks, i64 size, i64 count, u64* states) {
    __shared__ u32 warps[WARP];
    __shared__ i64 taken;
    __shared__ u64 first;
    const i64 tile = next_tile(states, &taken), number = tile * WIDE + threadIdx.x;
    u64 word = number < size ? marks[number] : ~0ull;
    u32 total;
    const u32 before = block_exclusive((u32)__popcll(~word), warps, total);
    if (threadIdx.x < WARP) {
        const u64 sum = look_back(states + 1, tile, total);
        if (threadIdx.x == 0) first = sum;
    }
    __syncthreads();
    const i64 left = count - (i64)first - before;
    if (left <= 0 || word == ~0ull) return;
    if (left >= __popcll(~word)) word = ~0ull;
    else
        for (int n = 0; n < left; n++) word |= word + 1;  // sets the lowest zero
    marks[number] = word;
}

// Move what is marked, and leave zeros behind.
extern "C" __global__ void __launch_bounds__(256) collect(
    u8* marks, i64 nbytes, T* sums, T* values, u32* places, u64* states) {
    __shared__ BitsRoom room;
    visit_bits(Words(marks, nbytes), true, states, room, [&](i64 j, i64 place) {
        values[j] = sums[place];
        places[j] = (u32)place;
        sums[place] = 0;
    });
}

// **merge.** Entries are cut into tiles of equally many by merge paths (Odeh et al. 2012; Green, McColl, Bader 2012),
// and tiles into threads. Of equal places mine comes first: it takes the sum of both, and theirs is left out.
constexpr int STEPS = 8;  // entries of a thread
constexpr int ENTRIES = STEPS * WIDE;

struct MergeRoom {
    u32 places[ENTRIES];  // mine, then theirs; then those of the sum
    T values[ENTRIES];
    u32 warps[WARP];
    i64 tile, ends[2];
    u64 first;
};

extern "C" __global__ void __launch_bounds__(256) merge(
    const u32* mine, const T* values, i64 k, const u32* theirs, const T* others, i64 l, u32* places, T* sums,
    u64* states) {
    __shared__ MergeRoom room;
    const int thread = threadIdx.x, warp = thread / WARP;
    const i64 tile = next_tile(states, &room.tile), start = tile * ENTRIES, stop = min(start + ENTRIES, k + l);
    if (warp < 2) {
        const i64 diagonal = warp ? stop : start;
        auto before = [&](i64 i) { return mine[i] <= theirs[diagonal - 1 - i]; };
        const i64 i = search(max(0ll, diagonal - l), min(diagonal, k), before);
        if (thread % WARP == 0) room.ends[warp] = i;
    }
    __syncthreads();
    const i64 first = room.ends[0], other = start - first;  // of mine and of theirs
    const int all = (int)(stop - start);
    // Within both lists also where they do not ascend, as those of a changed message need not.
    const int here = (int)min(max(room.ends[1] - first, all - (l - other)), min((i64)all, k - first)), there = all - here;
#pragma unroll
    for (int n = 0; n < STEPS; n++) {
        const int e = thread + n * WIDE;
        if (e < all) {
            room.places[e] = e < here ? mine[first + e] : theirs[other + e - here];
            room.values[e] = e < here ? values[first + e] : others[other + e - here];
        }
    }
    __syncthreads();

    // This thread's part of the path.
    const u32 *a = room.places, *b = room.places + here;
    const int diagonal = min(thread * STEPS, all), last = min(diagonal + STEPS, all);
    int i = max(0, diagonal - there);
    for (int high = min(diagonal, here); i < high;) {
        const int middle = (i + high) / 2;
        if (a[middle] <= b[diagonal - 1 - middle]) i = middle + 1;
        else high = middle;
    }
    int j = diagonal - i;
    const bool mine_left = first + here < k, theirs_left = other + there < l;  // behind the tile
    // The neighbours at its edges: the last of mine before it, and the first of theirs behind it.
    const i64 no_place = 1ll << 32;
    i64 previous = i ? a[i - 1] : first ? mine[first - 1] : no_place;
    const i64 next = theirs_left ? theirs[other + there] : no_place;
    u32 found_places[STEPS];
    T found[STEPS];
    u32 keeps = 0;
#pragma unroll
    for (int n = 0; n < STEPS; n++) {
        if (diagonal + n < last) {
            const bool is_mine = i < here && (j == there || a[i] <= b[j]);
            if (is_mine) {
                const i64 opposite = j < there ? b[j] : next;
                previous = found_places[n] = a[i];
                found[n] = room.values[i];
                if (opposite == previous) found[n] += j < there ? room.values[here + j] : others[other + j];
                else if (opposite != no_place) found[n] += 0;  // what is behind the end of the other is only copied
                i++;
                keeps |= 1u << n;
            } else {
                found_places[n] = b[j];
                found[n] = room.values[here + j];
                if (i < here || mine_left) found[n] += 0;
                if (previous != found_places[n]) keeps |= 1u << n;
                j++;
            }
        }
    }

    u32 total, at = block_exclusive((u32)__popc(keeps), room.warps, total);
    if (warp == 0) {
        const u64 before = look_back(states + 1, tile, total);
        if (thread == 0) room.first = before;
    }
#pragma unroll
    for (int n = 0; n < STEPS; n++)
        if (keeps >> n & 1) {
            room.places[at] = found_places[n];
            room.values[at++] = found[n];
        }
    __syncthreads();
    const i64 to = (i64)room.first;
    for (int e = thread; e < total; e += WIDE) {
        places[to + e] = room.places[e];
        sums[to + e] = room.values[e];
    }
}
