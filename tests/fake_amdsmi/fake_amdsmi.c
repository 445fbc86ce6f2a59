/* A libamd_smi.so of which the calls that Rocyard makes work, by the state file; gen.py makes all others say that they
 * are not supported. Structures are written after the ABI of amdsmi 7.0; a test compares their sizes with the package's. */
#include "state.h"

#define API __attribute__((visibility("default")))
#define TEXT 256
enum { OK = 0, INVALID = 1, NOT_SUPPORTED = 2, NOT_INIT = 32 };

static const char *state_variable(void) { return "FAKE_AMDSMI_STATE"; }

typedef struct { char market_name[TEXT]; uint32_t vendor_id; char vendor_name[TEXT]; uint32_t subvendor_id;
                 uint64_t device_id; uint32_t rev_id; char asic_serial[TEXT]; uint32_t oam_id, compute_units;
                 uint64_t graphics_version; uint32_t subsystem_id, reserved[21]; } asic_info_t;
typedef struct { uint64_t socket_power; uint32_t current_socket_power, average_socket_power; uint64_t gfx_voltage,
                 soc_voltage, mem_voltage; uint32_t power_limit; uint64_t reserved[18]; } power_info_t;
typedef struct { uint32_t gfx, umc, mm, reserved[13]; } engine_usage_t;
typedef struct { uint32_t drm_render, drm_card, hsa_id, hip_id; char hip_uuid[TEXT]; } enumeration_info_t;
typedef struct { uint64_t kfd_id; uint32_t node_id, current_partition_id, reserved[12]; } kfd_info_t;
typedef struct { char name[TEXT]; uint32_t pid; uint64_t mem; struct { uint64_t gfx, enc; uint32_t reserved[12]; } usage;
                 struct { uint64_t gtt, cpu, vram; uint32_t reserved[10]; } memory; char container[TEXT];
                 uint32_t cu_occupancy, reserved[11]; } proc_info_t;
typedef union { struct { uint64_t function : 3, device : 5, bus : 8, domain : 48; } part; uint64_t whole; } bdf_t;

API unsigned fake_sizeof_asic_info_t(void) { return sizeof(asic_info_t); }
API unsigned fake_sizeof_power_info_t(void) { return sizeof(power_info_t); }
API unsigned fake_sizeof_engine_usage_t(void) { return sizeof(engine_usage_t); }
API unsigned fake_sizeof_enumeration_info_t(void) { return sizeof(enumeration_info_t); }
API unsigned fake_sizeof_kfd_info_t(void) { return sizeof(kfd_info_t); }
API unsigned fake_sizeof_proc_info_t(void) { return sizeof(proc_info_t); }
API unsigned fake_sizeof_bdf_t(void) { return sizeof(bdf_t); }

static int running;
static char handles[64]; /* device i is known by the address of handles[i] */

/* Begin every call: the index of the device, or return its error. */
#define DEVICE(handle, call)                                         \
    int index = (int)((char *)(handle) - handles), code;             \
    if (!running) return NOT_INIT;                                   \
    if (index < 0 || index >= 64) return INVALID;                    \
    if ((code = state_error(index, call))) return code

API int amdsmi_init(uint64_t flags)
{
    int code = state_error(-1, "init");
    (void)flags;
    running = !code;
    return code;
}

API int amdsmi_shut_down(void)
{
    running = 0;
    return OK;
}

API int amdsmi_get_socket_handles(uint32_t *count, void **out)
{
    int code = running ? state_error(-1, "handles") : NOT_INIT;
    if (code)
        return code;
    *count = 1;
    if (out)
        out[0] = handles;
    return OK;
}

API int amdsmi_get_processor_handles(void *socket, uint32_t *count, void **out)
{
    uint32_t devices = (uint32_t)state_number(-1, "count", 0), i;
    (void)socket;
    if (!running)
        return NOT_INIT;
    for (i = 0; out && i < devices && i < *count; i++)
        out[i] = handles + i;
    *count = devices;
    return OK;
}

API int amdsmi_get_gpu_device_bdf(void *handle, bdf_t *bdf)
{
    DEVICE(handle, "bdf");
    bdf->whole = 0;
    bdf->part.bus = (uint64_t)state_number(index, "bus", 5 + index);
    bdf->part.function = (uint64_t)state_number(index, "function", 0);
    return OK;
}

API int amdsmi_get_gpu_device_uuid(void *handle, uint32_t *size, char *uuid)
{
    DEVICE(handle, "uuid");
    return state_text(index, "uuid", uuid, *size) ? OK : NOT_SUPPORTED;
}

API int amdsmi_get_gpu_enumeration_info(void *handle, enumeration_info_t *info)
{
    DEVICE(handle, "enumeration");
    memset(info, 0, sizeof *info);
    info->hip_id = (uint32_t)state_number(index, "hip_id", index);
    return state_text(index, "hip_uuid", info->hip_uuid, TEXT) ? OK : NOT_SUPPORTED;
}

API int amdsmi_get_gpu_kfd_info(void *handle, kfd_info_t *info)
{
    DEVICE(handle, "kfd");
    memset(info, 0, sizeof *info);
    info->current_partition_id = (uint32_t)state_number(index, "partition", 0);
    return OK;
}

API int amdsmi_get_gpu_asic_info(void *handle, asic_info_t *info)
{
    DEVICE(handle, "asic");
    memset(info, 0, sizeof *info);
    state_text(index, "name", info->market_name, TEXT);
    state_text(index, "serial", info->asic_serial, TEXT);
    info->graphics_version = (uint64_t)state_number(index, "gfx", 0x942);
    return OK;
}

API int amdsmi_get_gpu_memory_total(void *handle, uint32_t kind, uint64_t *bytes)
{
    DEVICE(handle, "total");
    *bytes = (uint64_t)state_number(index, "total", 0);
    return kind == 0 ? OK : NOT_SUPPORTED;
}

API int amdsmi_get_gpu_memory_usage(void *handle, uint32_t kind, uint64_t *bytes)
{
    DEVICE(handle, "used");
    *bytes = (uint64_t)state_number(index, "used", 0);
    return kind == 0 ? OK : NOT_SUPPORTED;
}

API int amdsmi_get_gpu_activity(void *handle, engine_usage_t *usage)
{
    DEVICE(handle, "activity");
    memset(usage, 0, sizeof *usage);
    usage->gfx = (uint32_t)state_number(index, "activity", 0xFFFF);
    usage->umc = usage->mm = 0xFFFF;
    return OK;
}

API int amdsmi_get_temp_metric(void *handle, uint32_t sensor, uint32_t metric, int64_t *degrees)
{
    DEVICE(handle, "temperature");
    if (metric != 0 || sensor != (uint32_t)state_number(index, "sensor", 1))
        return NOT_SUPPORTED;
    *degrees = state_number(index, "temperature", 0);
    return OK;
}

API int amdsmi_get_power_info(void *handle, power_info_t *info)
{
    DEVICE(handle, "power");
    memset(info, 0, sizeof *info);
    info->socket_power = (uint64_t)state_number(index, "socket_power", 0xFFFF);
    info->current_socket_power = (uint32_t)state_number(index, "power", 0xFFFF);
    info->average_socket_power = 0xFFFF;
    return OK;
}

API int amdsmi_get_gpu_process_list(void *handle, uint32_t *count, proc_info_t *list)
{
    uint64_t pid, bytes;
    uint32_t i;
    DEVICE(handle, "processes");
    for (i = 0; i < *count && state_pair(index, "process", (int)i, &pid, &bytes); i++) {
        memset(&list[i], 0, sizeof list[i]);
        snprintf(list[i].name, TEXT, "fake");
        list[i].pid = (uint32_t)pid;
        list[i].mem = list[i].memory.vram = bytes;
    }
    *count = i;
    return OK;
}

API int amdsmi_get_gpu_compute_partition(void *handle, char *out, uint32_t size)
{
    DEVICE(handle, "compute");
    return state_text(index, "compute", out, size) ? OK : NOT_SUPPORTED;
}

API int amdsmi_get_gpu_memory_partition(void *handle, char *out, uint32_t size)
{
    DEVICE(handle, "memory");
    return state_text(index, "memory", out, size) ? OK : NOT_SUPPORTED;
}
