/* The state of a fake driver: a text file named by an environment variable and read anew at every call, so that a test
 * changes what the driver says while somebody uses it. Each line is "DEVICE KEY VALUE" or "DEVICE KEY VALUE VALUE";
 * the driver's own lines have -1 for the device. A call that fails has a line "DEVICE error.CALL CODE". */
#ifndef FAKE_STATE_H
#define FAKE_STATE_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *state_variable(void);

/* The nth line (from 0) for this device and key: copies the text after the key. Returns 0 if there is none. */
static int state_line(const char *device, const char *key, int nth, char *out, size_t size)
{
    const char *path = getenv(state_variable());
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    int found = 0;
    if (!file)
        return 0;
    while (!found && fgets(line, sizeof line, file)) {
        char *save, *owner = strtok_r(line, " \n", &save), *name = strtok_r(NULL, " \n", &save);
        char *rest = strtok_r(NULL, "\n", &save);
        if (owner && name && rest && !strcmp(owner, device) && !strcmp(name, key) && nth-- == 0) {
            snprintf(out, size, "%s", rest);
            found = 1;
        }
    }
    fclose(file);
    return found;
}

static int state_text(int device, const char *key, char *out, size_t size)
{
    char owner[16];
    snprintf(owner, sizeof owner, "%d", device);
    return state_line(owner, key, 0, out, size);
}

static int64_t state_number(int device, const char *key, int64_t otherwise)
{
    char text[512];
    return state_text(device, key, text, sizeof text) ? (int64_t)strtoull(text, NULL, 0) : otherwise;
}

/* Two numbers of the nth line of that key; returns 0 if there is none. */
static int state_pair(int device, const char *key, int nth, uint64_t *first, uint64_t *second)
{
    char owner[16], text[512], *end;
    snprintf(owner, sizeof owner, "%d", device);
    if (!state_line(owner, key, nth, text, sizeof text))
        return 0;
    *first = strtoull(text, &end, 0);
    *second = strtoull(end, NULL, 0);
    return 1;
}

/* The code that this call is to fail with, or 0. Sleeps while the driver is to hang. */
static int state_error(int device, const char *call)
{
    char key[64];
    while (state_number(-1, "hang", 0))
        usleep(20000);
    snprintf(key, sizeof key, "error.%s", call);
    return (int)state_number(device, key, state_number(device, "error", 0));
}
#endif
