/* A libnvidia-ml.so.1 of which the calls that Rocyard makes work, by the state file. The Python package looks calls up
 * late, so the others may be missing. Structures are written after NVML's ABI; a test compares their sizes. */
#include "state.h"

#define API __attribute__((visibility("default")))
enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, LOST = 15 };

static const char *state_variable(void) { return "FAKE_NVML_STATE"; }

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { char legacy[16]; unsigned domain, bus, device, device_id, subsystem_id; char bus_id[32]; } pci_t;
typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { unsigned version, sensor; int degrees; } temperature_t;

API unsigned fake_sizeof_memory_t(void) { return sizeof(memory_t); }
API unsigned fake_sizeof_utilization_t(void) { return sizeof(utilization_t); }
API unsigned fake_sizeof_pci_t(void) { return sizeof(pci_t); }
API unsigned fake_sizeof_process_t(void) { return sizeof(process_t); }
API unsigned fake_sizeof_temperature_t(void) { return sizeof(temperature_t); }

static int running;
static char handles[64]; /* cards are 0..31; instance i of card c is 32 + 4c + i, and has its lines under that number */

#define DEVICE(handle, call)                                         \
    int index = (int)((char *)(handle) - handles), code;             \
    if (!running) return UNINITIALIZED;                              \
    if (index < 0 || index >= 64) return INVALID;                    \
    if ((code = state_error(index, call))) return code

API int nvmlInitWithFlags(unsigned flags)
{
    int code = state_error(-1, "init");
    (void)flags;
    running = !code;
    return code;
}

API int nvmlShutdown(void)
{
    running = 0;
    return OK;
}

API const char *nvmlErrorString(int code) { return code == 4 ? "Insufficient Permissions" : "Fake error"; }

API int nvmlDeviceGetCount_v2(unsigned *count)
{
    int code = running ? state_error(-1, "count") : UNINITIALIZED;
    *count = (unsigned)state_number(-1, "count", 0);
    return code;
}

API int nvmlDeviceGetHandleByIndex_v2(unsigned position, void **handle)
{
    *handle = handles + position;
    return running ? state_error((int)position, "handle") : UNINITIALIZED;
}

API int nvmlDeviceGetName(void *handle, char *out, unsigned size)
{
    DEVICE(handle, "name");
    return state_text(index, "name", out, size) ? OK : NOT_SUPPORTED;
}

API int nvmlDeviceGetUUID(void *handle, char *out, unsigned size)
{
    DEVICE(handle, "uuid");
    return state_text(index, "uuid", out, size) ? OK : NOT_SUPPORTED;
}

API int nvmlDeviceGetPciInfo_v3(void *handle, pci_t *pci)
{
    DEVICE(handle, "bdf");
    memset(pci, 0, sizeof *pci);
    pci->bus = (unsigned)state_number(index, "bus", 5 + index);
    return OK;
}

API int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor)
{
    DEVICE(handle, "capability");
    *major = 9;
    *minor = 0;
    return OK;
}

API int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory)
{
    DEVICE(handle, "used");
    memory->total = (unsigned long long)state_number(index, "total", 0);
    memory->used = (unsigned long long)state_number(index, "used", 0);
    memory->free = memory->total - memory->used;
    return OK;
}

API int nvmlDeviceGetUtilizationRates(void *handle, utilization_t *rates)
{
    DEVICE(handle, "activity");
    rates->gpu = (unsigned)state_number(index, "activity", 0);
    rates->memory = 0;
    return OK;
}

API int nvmlDeviceGetTemperature(void *handle, unsigned sensor, unsigned *degrees)
{
    DEVICE(handle, "temperature");
    *degrees = (unsigned)state_number(index, "temperature", 0);
    return sensor == 0 ? OK : NOT_SUPPORTED;
}

API int nvmlDeviceGetTemperatureV(void *handle, temperature_t *temperature)
{
    DEVICE(handle, "temperature_v");
    temperature->degrees = (int)state_number(index, "temperature", 0);
    return OK;
}

API int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts)
{
    DEVICE(handle, "power");
    *milliwatts = (unsigned)(1000 * state_number(index, "power", 0));
    return OK;
}

static int processes(int index, const char *key, unsigned *count, process_t *list)
{
    uint64_t pid, bytes;
    unsigned room = list ? *count : 0;
    for (*count = 0; state_pair(index, key, (int)*count, &pid, &bytes); ++*count) {
        if (*count < room)
            list[*count] = (process_t){(unsigned)pid, bytes, ~0u, ~0u};
    }
    return *count > room ? INSUFFICIENT_SIZE : OK;
}

API int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *list)
{
    DEVICE(handle, "processes");
    return processes(index, "process", count, list);
}

API int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, process_t *list)
{
    DEVICE(handle, "drawing");
    return processes(index, "drawing", count, list);
}

API int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending)
{
    DEVICE(handle, "mig");
    *current = *pending = (unsigned)state_number(index, "mig", 0);
    return OK;
}

API int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count)
{
    DEVICE(handle, "mig");
    *count = 4;
    return OK;
}

API int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned position, void **instance)
{
    int there;
    DEVICE(handle, "mig");
    there = state_number(32 + 4 * index + (int)position, "total", 0) != 0;
    *instance = handles + 32 + 4 * index + position;
    return there ? OK : 6; /* not found */
}
