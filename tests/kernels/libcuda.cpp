// A double of libcuda for tests: it keeps what it is told, and runs kernels that were compiled for the CPU.
//
// An "image" is text: how many pointers and how many integers its kernels take, and, for those that are more than noted down, the
// shared libraries of the emulator and of the kernels. Contexts are numbers, from 1000 on by device; there are two devices.
#include <dlfcn.h>

#include <mutex>
#include <sstream>
#include <string>
#include <vector>

struct Place {
    unsigned x, y, z;
};
struct Module {
    int pointers, integers;
    void *emulator, *kernels;
};
struct Function {
    Module* module;
    std::string name;
    int shared;
};
typedef void (*Emulate)(void* kernel, void* spoil, const unsigned long* arguments, Place grid, unsigned threads, bool backwards);

static std::mutex lock;
static std::string log_text;
static int failing;
static thread_local std::vector<void*> contexts;

static void note(const std::string& line) {
    std::lock_guard<std::mutex> held(lock);
    log_text += line + "\n";
}

static void* current() { return contexts.empty() ? nullptr : contexts.back(); }

extern "C" {
// For tests: what was noted since the last time, and the status that the next launch gives.
const char* taken() {
    static std::string out;
    std::lock_guard<std::mutex> held(lock);
    out.swap(log_text);
    log_text.clear();
    return out.c_str();
}
void fail_next(int status) { failing = status; }

int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal < 2 ? 0 : 101; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
    note("retain " + std::to_string(device));
    return *context = reinterpret_cast<void*>(1000l + device), 0;
}
int cuCtxGetCurrent(void** context) { return *context = current(), 0; }
int cuCtxPushCurrent_v2(void* context) { return contexts.push_back(context), 0; }
int cuCtxPopCurrent_v2(void** context) {
    if (contexts.empty()) return 201;
    *context = contexts.back();
    return contexts.pop_back(), 0;
}
int cuModuleLoadData(void** module, const char* image) {
    if (!current()) return 201;
    Module* found = new Module{};
    std::istringstream text(image);
    std::string emulator, kernels;
    if (!(text >> found->pointers >> found->integers)) return 200;
    if (text >> emulator >> kernels) {
        found->emulator = dlopen(emulator.c_str(), RTLD_NOW | RTLD_GLOBAL);
        found->kernels = found->emulator ? dlopen(kernels.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
        if (!found->kernels) return note(dlerror()), 209;
    }
    return *module = found, 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    Module* held = static_cast<Module*>(module);
    if (held->kernels && !dlsym(held->kernels, name)) return 500;
    return *function = new Function{held, name, 0}, 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8) return 1;
    return static_cast<Function*>(function)->shared = value, 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** arguments, void** extra) {
    Function* f = static_cast<Function*>(function);
    std::ostringstream line;
    if (int status = failing) return failing = 0, status;
    if (!current()) return 201;
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || bx > 1024 || by != 1 || bz != 1 || extra) return 1;
    if (shared > 48 << 10 && int(shared) > f->shared) return 1;
    line << "launch " << f->name << " context " << reinterpret_cast<long>(current()) << " stream "
         << reinterpret_cast<long>(stream) << " grid " << gx << " " << gy << " " << gz << " threads " << bx << " shared " << shared
         << " arguments";
    const Module& module = *f->module;
    std::vector<unsigned long> values(18);
    for (int i = 0; i < module.pointers + module.integers; i++) {
        if (i < module.pointers) line << " " << (values[i] = *static_cast<unsigned long*>(arguments[i]));
        else line << " " << int(values[i] = *static_cast<int*>(arguments[i]));
    }
    note(line.str());
    if (module.kernels) {
        const Emulate emulate = reinterpret_cast<Emulate>(dlsym(module.emulator, "launch"));
        emulate(dlsym(module.kernels, f->name.c_str()), dlsym(module.kernels, "spoil"), values.data(), {gx, gy, gz}, bx, false);
    }
    return 0;
}
int cuGetErrorName(int status, const char** name) {
    *name = status == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : status == 201 ? "CUDA_ERROR_INVALID_CONTEXT" : status == 1 ? "CUDA_ERROR_INVALID_VALUE" : status == 200 ? "CUDA_ERROR_INVALID_IMAGE" : nullptr;
    return *name ? 0 : 1;
}
int cuGetErrorString(int status, const char** words) {
    *words = status == 209 ? "no kernel image is available for execution on the device" : status == 201 ? "invalid device context" : nullptr;
    return *words ? 0 : 1;
}
}
