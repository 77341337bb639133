// Emulator: the lanes of a block as fibers that wait for one another, and halves with exact arithmetic.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

namespace {

enum class State { ready, product, exchange, barrier, done };

struct Lane {
    ucontext_t context;
    State state;
    float* sum;
    const u32 *a, *b;
    int depth, apart;
    bool bfloat;
    float value;
};

constexpr size_t STACK = 256 << 10;
std::vector<Lane> lanes;
std::vector<char> stacks;
ucontext_t scheduler;
u32 current;
void* entry;
const u64* values;

[[noreturn]] void fail(const char* what) {
    fprintf(stderr, "emulator: %s, lane %u\n", what, current);
    abort();
}

void body() {
    // As the ABI passes integers and pointers, whatever their size; the callee leaves those that it does not have.
    typedef void Kernel(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64);
    const u64* v = values;
    reinterpret_cast<Kernel*>(entry)(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14],
                                     v[15], v[16], v[17]);
    lanes[current].state = State::done;
}

double number(u16 half, bool bfloat) {
    if (!bfloat) return __builtin_bit_cast(_Float16, half);
    return __builtin_bit_cast(float, u32(half) << 16);
}

u16 rounded(double x, bool bfloat) {
    if (!bfloat) return __builtin_bit_cast(u16, _Float16(x));
    if (std::isfinite(x) && x != 0) {
        int exponent;
        frexp(x, &exponent);
        const int last = std::max(exponent - 8, -133);
        x = ldexp(nearbyint(ldexp(x, -last)), last);
    }
    return __builtin_bit_cast(u32, float(x)) >> 16;
}

// a * b + c, rounded once: the product is exact, and a sum that is not is made odd, so that it is no tie between halves.
u16 fma_half(u16 a, u16 b, u16 c, bool bfloat) {
    const double product = number(a, bfloat) * number(b, bfloat), more = number(c, bfloat);
    double sum = product + more;
    const double rest = sum - product, error = (product - (sum - rest)) + (more - rest);
    if (std::isfinite(sum) && error != 0 && !(__builtin_bit_cast(u64, sum) & 1)) sum = nextafter(sum, error > 0 ? INFINITY : -INFINITY);
    return rounded(sum, bfloat);
}

// The fragments of mma.m16n8k16 and m16n8k8 in PTX's tables: lane 4g + t.
void multiply(Lane* warp) {
    double left[16][16] = {}, right[16][8] = {};
    const int depth = warp->depth;
    const bool bfloat = warp->bfloat;
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int j = 0; j < depth / 4; j++)
            for (int h = 0; h < 2; h++) left[g + j % 2 * 8][2 * t + h + j / 2 * 8] = number(warp[lane].a[j] >> 16 * h, bfloat);
        for (int j = 0; j < depth / 8; j++)
            for (int h = 0; h < 2; h++) right[2 * t + h + j * 8][g] = number(warp[lane].b[j] >> 16 * h, bfloat);
    }
    for (int lane = 0; lane < 32; lane++)
        for (int j = 0; j < 4; j++) {
            const int row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
            double sum = warp[lane].sum[j];
            for (int k = 0; k < depth; k++) sum += left[row][k] * right[k][column];
            warp[lane].sum[j] = sum;
        }
}

void exchange(Lane* warp) {
    float found[32];
    for (int lane = 0; lane < 32; lane++) found[lane] = warp[lane ^ warp[lane].apart].value;
    for (int lane = 0; lane < 32; lane++) warp[lane].value = found[lane];
}

// Stops the lane until all of its warp, or block, are at the same; the last to come does what they came for.
void wait(State what) {
    Lane& lane = lanes[current];
    lane.state = what;
    const size_t first = what == State::barrier ? 0 : current / 32 * 32, count = what == State::barrier ? lanes.size() : 32;
    const auto begin = lanes.begin() + first, end = begin + count;
    if (std::all_of(begin, end, [&](const Lane& other) { return other.state == what; })) {
        if (what == State::product) multiply(&*begin);
        if (what == State::exchange) exchange(&*begin);
        for (auto other = begin; other != end; ++other) other->state = State::ready;
    } else {
        swapcontext(&lane.context, &scheduler);
    }
}

void start(Lane& lane, char* stack) {
    lane.state = State::ready;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = stack;
    lane.context.uc_stack.ss_size = STACK;
    lane.context.uc_link = &scheduler;
    makecontext(&lane.context, body, 0);
}

}  // namespace

extern "C" {

struct Place { u32 x, y, z; };
Place threadIdx, blockIdx, gridDim;

void __syncthreads() { wait(State::barrier); }

float __shfl_xor_sync(u32, float value, int apart) {
    Lane& lane = lanes[current];
    lane.value = value, lane.apart = apart;
    wait(State::exchange);
    return lane.value;
}

u32 __byte_perm(u32 low, u32 high, u32 selector) {
    const u64 bytes = u64(high) << 32 | low;
    u32 found = 0;
    for (int i = 0; i < 4; i++) found |= u32(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return found;
}

u32 emulated_fma2(u32 a, u32 b, u32 c, bool bfloat) {
    return fma_half(a, b, c, bfloat) | u32(fma_half(a >> 16, b >> 16, c >> 16, bfloat)) << 16;
}

void emulated_mma(float* sum, const u32* a, const u32* b, int depth, bool bfloat) {
    Lane& lane = lanes[current];
    lane.sum = sum, lane.a = a, lane.b = b, lane.depth = depth, lane.bfloat = bfloat;
    wait(State::product);
}

float emulated_float(u16 half, bool bfloat) { return number(half, bfloat); }
u16 emulated_half(float value, bool bfloat) { return rounded(value, bfloat); }

void emulated_load(void* to, const void* from, int bytes) {
    if (u64(from) % bytes) fail("a load that is not aligned");
    memcpy(to, from, bytes);
}

// Runs a kernel on every block of a grid; lanes take turns in their order, or backwards.
void launch(void* kernel, void (*spoil)(), const u64* arguments, Place grid, u32 threads, bool backwards) {
    entry = kernel, values = arguments, gridDim = grid;
    lanes.resize(threads), stacks.resize(threads * STACK);
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
                spoil();
                for (u32 i = 0; i < threads; i++) start(lanes[i], &stacks[i * STACK]);
                for (bool moved = true; moved;) {
                    moved = false;
                    for (u32 i = 0; i < threads; i++) {
                        current = backwards ? threads - 1 - i : i;
                        if (lanes[current].state != State::ready) continue;
                        threadIdx = {current, 0, 0}, moved = true;
                        swapcontext(&scheduler, &lanes[current].context);
                    }
                }
                for (current = 0; current < threads; current++)
                    if (lanes[current].state != State::done) fail("waits for others that do not come");
            }
}
}
