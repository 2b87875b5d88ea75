"""Builds ``agent.kernel._libbpf``: libbpf through cffi, and the few lines of C that drain the ring buffer.

In: nothing. Out: a cffi builder that setuptools runs at install time (``ffibuilder``). The C part copies whole batches
of records into one buffer per call, so that no Python runs per record; the memory ordering towards the kernel is
libbpf's.
"""

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef(
    """
struct bpf_object; struct bpf_map; struct bpf_program; struct bpf_link; struct ring_buffer;
struct bpf_object *bpf_object__open_file(const char *path, const void *opts);
int bpf_object__load(struct bpf_object *object);
void bpf_object__close(struct bpf_object *object);
struct bpf_map *bpf_object__find_map_by_name(const struct bpf_object *object, const char *name);
struct bpf_program *bpf_object__find_program_by_name(const struct bpf_object *object, const char *name);
struct bpf_program *bpf_object__next_program(const struct bpf_object *object, struct bpf_program *previous);
const char *bpf_program__name(const struct bpf_program *program);
int bpf_program__fd(const struct bpf_program *program);
int bpf_program__set_expected_attach_type(struct bpf_program *program, int type);
int bpf_program__set_autoload(struct bpf_program *program, bool autoload);
struct bpf_link *bpf_program__attach(const struct bpf_program *program);
int bpf_link__destroy(struct bpf_link *link);
int bpf_link__fd(const struct bpf_link *link);
int bpf_map__fd(const struct bpf_map *map);
int bpf_map__reuse_fd(struct bpf_map *map, int fd);
int bpf_map_get_fd_by_id(uint32_t id);
int bpf_map__set_max_entries(struct bpf_map *map, uint32_t entries);
int bpf_map__set_value_size(struct bpf_map *map, uint32_t bytes);
uint32_t bpf_map__key_size(const struct bpf_map *map);
void *bpf_map__initial_value(struct bpf_map *map, size_t *bytes);
int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_delete_elem(int fd, const void *key);
int bpf_map_get_next_key(int fd, const void *key, void *next_key);
int bpf_iter_create(int link_fd);
int libbpf_num_possible_cpus(void);
int libbpf_probe_bpf_prog_type(int type, const void *opts);
int libbpf_probe_bpf_map_type(int type, const void *opts);

struct drain { ...; };
struct drain *spanloom_drain_new(int map_fd);
void spanloom_drain_free(struct drain *drain);
int spanloom_drain_wait(struct drain *drain, int timeout_ms);
long spanloom_drain(struct drain *drain, void *buffer, size_t bytes, uint32_t *offsets, size_t slots);
size_t spanloom_drain_used(struct drain *drain);

void *spanloom_variable(struct bpf_object *object, const char *section, const char *name, uint32_t bytes,
                        int map_fd);
int spanloom_share_maps(struct bpf_object *object, const struct bpf_object *loaded);
int spanloom_describe(struct bpf_object *object, const char *name, char *text, size_t bytes);
struct bpf_link *spanloom_attach_map_iter(struct bpf_program *program, struct bpf_map *map);
int spanloom_test_run(int program_fd, uint32_t repeat, uint32_t *duration_ns, void *context, uint32_t context_bytes,
                      uint32_t *retval);

struct program_statistics {
    uint64_t run_time_ns, run_count, misses;
    uint32_t verified_instructions;
};
int spanloom_program_statistics(int program_fd, struct program_statistics *statistics);
struct bpf_link *spanloom_attach_uprobe_at(struct bpf_program *program, const char *path, size_t offset,
                                           bool is_return);
int spanloom_link_uprobe(int program_fd, const char *path, uint64_t offset, bool is_return);
bool spanloom_links_uprobes(void);
int spanloom_canary_under_filter(void);
long spanloom_btf_types(const char *path);
int spanloom_missing_types(const char *const *names, const uint32_t *kinds, int count);
long spanloom_jited_bytes(int program_fd);
void spanloom_log_reset(void);
const char *spanloom_log(void);
void spanloom_give_memory_back(void);
#define UPROBE_LINK ...
long spanloom_bpf(int command, void *attributes, unsigned int bytes);
"""
)

ffibuilder.set_source(
    "agent.kernel._libbpf",
    r"""
#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define UPROBE_LINK 48 /* BPF_TRACE_UPROBE_MULTI of enum bpf_attach_type */

/* What libbpf said since the last reset; kept for the error message, never printed by itself. Bounded: the end of the
 * text is what names the cause, so a full buffer drops what is oldest. One message alone may be longer than the buffer:
 * the verifier's whole log is one, of up to 16 MB. */
static char log_text[65536];
static size_t log_used;

static int keep_log(enum libbpf_print_level level, const char *format, va_list arguments)
{
    const size_t room = sizeof(log_text) - 1;
    va_list again;
    size_t kept, excess;
    char *message;
    int length;

    if (level == LIBBPF_DEBUG)
        return 0;
    va_copy(again, arguments);
    length = vsnprintf(NULL, 0, format, again);
    va_end(again);
    if (length <= 0)
        return length;
    message = malloc((size_t)length + 1);
    if (!message)
        return 0;
    vsnprintf(message, (size_t)length + 1, format, arguments);
    kept = (size_t)length < room ? (size_t)length : room;
    excess = log_used + kept > room ? log_used + kept - room : 0;
    log_used -= excess;
    memmove(log_text, log_text + excess, log_used);
    memcpy(log_text + log_used, message + length - kept, kept);
    log_used += kept;
    log_text[log_used] = 0;
    free(message);
    return length;
}

static void spanloom_log_reset(void)
{
    log_used = 0;
    log_text[0] = 0;
    libbpf_set_print(keep_log);
}

static const char *spanloom_log(void) { return log_text; }

/* A reader of a BPF ring buffer, as Documentation/bpf/ringbuf.rst and kernel/bpf/ringbuf.c lay it out: a page with the
 * reader's position, one with the writers', then the data. The data can be mapped twice in a row, so that no record is
 * broken at the end, and libbpf's ring_buffer does; the process is then charged twice for it (8 MiB of RSS more).
 * Records are copied here anyway, a broken one in two parts.
 */
struct drain {
    int epoll;
    size_t page, ring_bytes, used;
    unsigned long *reader;
    const unsigned long *writers;
    const unsigned char *data;
};

static void spanloom_drain_free(struct drain *drain)
{
    if (!drain)
        return;
    if (drain->writers)
        munmap((void *)drain->writers, drain->page + drain->ring_bytes);
    if (drain->reader)
        munmap(drain->reader, drain->page);
    if (drain->epoll >= 0)
        close(drain->epoll);
    free(drain);
}

/* NULL with errno when it cannot be mapped. */
static struct drain *spanloom_drain_new(int map_fd)
{
    struct drain *drain = calloc(1, sizeof(*drain));
    struct epoll_event wanted = {.events = EPOLLIN};
    struct bpf_map_info info = {};
    uint32_t info_bytes = sizeof(info);
    int error;
    void *mapped;

    if (!drain)
        return NULL;
    drain->page = sysconf(_SC_PAGESIZE);
    drain->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (drain->epoll < 0 || epoll_ctl(drain->epoll, EPOLL_CTL_ADD, map_fd, &wanted) ||
        bpf_obj_get_info_by_fd(map_fd, &info, &info_bytes))
        goto failed;
    drain->ring_bytes = info.max_entries;
    mapped = mmap(NULL, drain->page, PROT_READ | PROT_WRITE, MAP_SHARED, map_fd, 0);
    if (mapped == MAP_FAILED)
        goto failed;
    drain->reader = mapped;
    mapped = mmap(NULL, drain->page + drain->ring_bytes, PROT_READ, MAP_SHARED, map_fd, drain->page);
    if (mapped == MAP_FAILED)
        goto failed;
    drain->writers = mapped;
    drain->data = (const unsigned char *)mapped + drain->page;
    return drain;
failed:
    error = errno;
    spanloom_drain_free(drain);
    errno = error;
    return NULL;
}

/* 1: the kernel asked to be read, or records were left by the last call; 0: time is up; negative: -errno. It is epoll
 * and not poll, which would return for records whose writers asked for no wake-up. */
static int spanloom_drain_wait(struct drain *drain, int timeout_ms)
{
    struct epoll_event event;
    int count = epoll_wait(drain->epoll, &event, 1, timeout_ms);

    return count < 0 ? -errno : count;
}

/* Copies one batch, and gives each record's room back at once. Returns the number of records. Offsets are relative to
 * the buffer, whose size is a multiple of 8; records keep the kernel's 8-byte alignment. -EMSGSIZE: the next record is
 * larger than the buffer.
 */
static long spanloom_drain(struct drain *drain, void *buffer, size_t bytes, uint32_t *offsets, size_t slots)
{
    unsigned long position = *drain->reader; /* nobody else writes it */
    const unsigned long mask = drain->ring_bytes - 1;
    unsigned char *copy = buffer;
    size_t count = 0;

    drain->used = 0;
    while (count < slots && position < __atomic_load_n(drain->writers, __ATOMIC_ACQUIRE)) {
        /* A header never wraps: the ring and every record are multiples of 8 bytes. */
        const uint32_t *header = (const uint32_t *)(drain->data + (position & mask));
        uint32_t length = __atomic_load_n(header, __ATOMIC_ACQUIRE);
        const int is_record = !(length & BPF_RINGBUF_DISCARD_BIT);

        if (length & BPF_RINGBUF_BUSY_BIT)
            break;
        length &= ~BPF_RINGBUF_DISCARD_BIT;
        if (is_record) {
            const unsigned long start = (position + BPF_RINGBUF_HDR_SZ) & mask;
            const size_t first = length < drain->ring_bytes - start ? length : drain->ring_bytes - start;

            if (length > bytes - drain->used) {
                if (!count)
                    return -EMSGSIZE;
                break;
            }
            memcpy(copy + drain->used, drain->data + start, first);
            memcpy(copy + drain->used + first, drain->data, length - first);
            offsets[count++] = drain->used;
            drain->used += (length + 7) & ~(size_t)7;
        }
        position += (length + BPF_RINGBUF_HDR_SZ + 7) & ~7ul;
        __atomic_store_n(drain->reader, position, __ATOMIC_RELEASE);
    }
    return count;
}

static size_t spanloom_drain_used(struct drain *drain) { return drain->used; }

/* The address of a global variable: before loading in libbpf's initial values, after it (`map_fd` given) in the map
 * itself. The whole map is mapped once per call and stays mapped: callers keep the pointer for the object's lifetime.
 */
static void *spanloom_variable(struct bpf_object *object, const char *section, const char *name, uint32_t bytes,
                               int map_fd)
{
    const struct btf *btf = bpf_object__btf(object);
    struct bpf_map *map = bpf_object__find_map_by_name(object, section);
    int id = btf ? btf__find_by_name_kind(btf, section, BTF_KIND_DATASEC) : -1;
    const struct btf_type *datasec;
    const struct btf_var_secinfo *info;
    size_t size;
    char *start;

    if (!map || id < 0)
        return NULL;
    start = bpf_map__initial_value(map, &size);
    if (map_fd >= 0) {
        size_t page = sysconf(_SC_PAGESIZE);

        start = mmap(NULL, (size + page - 1) / page * page, PROT_READ | PROT_WRITE, MAP_SHARED, map_fd, 0);
        if (start == MAP_FAILED)
            return NULL;
    }
    datasec = btf__type_by_id(btf, id);
    info = btf_var_secinfos(datasec);
    for (int i = 0; start && i < btf_vlen(datasec); i++, info++) {
        const struct btf_type *variable = btf__type_by_id(btf, info->type);

        if (!strcmp(btf__name_by_offset(btf, variable->name_off), name))
            return info->size == bytes && info->offset + bytes <= size ? start + info->offset : NULL;
    }
    return NULL;
}

/* Writes one line per member of a struct ("name offset size kind") or per value of an enum ("name value"). */
static int spanloom_describe(struct bpf_object *object, const char *name, char *text, size_t bytes)
{
    const struct btf *btf = bpf_object__btf(object);
    size_t used = 0;
    int id;

    if (!btf)
        return -ENOENT;
    id = btf__find_by_name_kind(btf, name, BTF_KIND_STRUCT);
    if (id >= 0) {
        const struct btf_type *type = btf__type_by_id(btf, id);
        const struct btf_member *member = btf_members(type);

        for (int i = 0; i < btf_vlen(type); i++, member++) {
            const struct btf_type *resolved = btf__type_by_id(btf, btf__resolve_type(btf, member->type));

            used += snprintf(text + used, bytes - used, "%s %u %lld %s\n", btf__name_by_offset(btf, member->name_off),
                             btf_member_bit_offset(type, i) / 8, (long long)btf__resolve_size(btf, member->type),
                             btf_is_array(resolved) ? "array" : "integer");
            if (used >= bytes)
                return -E2BIG;
        }
        used += snprintf(text + used, bytes - used, "sizeof 0 %u struct\n", type->size);
        return used < bytes ? 0 : -E2BIG;
    }
    id = btf__find_by_name_kind(btf, name, BTF_KIND_ENUM);
    if (id >= 0) {
        const struct btf_type *type = btf__type_by_id(btf, id);
        const struct btf_enum *value = btf_enum(type);

        for (int i = 0; i < btf_vlen(type); i++, value++) {
            used += snprintf(text + used, bytes - used, "%s %d\n", btf__name_by_offset(btf, value->name_off),
                             value->val);
            if (used >= bytes)
                return -E2BIG;
        }
        return 0;
    }
    return -ENOENT;
}

/* Lets an object of the same file use the maps of one that is loaded: all of them, variables and constants as well. */
static int spanloom_share_maps(struct bpf_object *object, const struct bpf_object *loaded)
{
    struct bpf_map *map, *other;
    int error;

    bpf_object__for_each_map(map, object) {
        other = bpf_object__find_map_by_name(loaded, bpf_map__name(map));
        if (!other)
            return -ENOENT;
        error = bpf_map__reuse_fd(map, bpf_map__fd(other));
        if (error)
            return error;
    }
    return 0;
}

static struct bpf_link *spanloom_attach_map_iter(struct bpf_program *program, struct bpf_map *map)
{
    union bpf_iter_link_info info = { .map.map_fd = bpf_map__fd(map) };
    LIBBPF_OPTS(bpf_iter_attach_opts, options, .link_info = &info, .link_info_len = sizeof(info));

    return bpf_program__attach_iter(program, &options);
}

static int spanloom_test_run(int program_fd, uint32_t repeat, uint32_t *duration_ns, void *context,
                             uint32_t context_bytes, uint32_t *retval)
{
    LIBBPF_OPTS(bpf_test_run_opts, options, .repeat = repeat, .ctx_in = context, .ctx_size_in = context_bytes);
    int error = bpf_prog_test_run_opts(program_fd, &options);

    *duration_ns = options.duration;
    *retval = options.retval;
    return error;
}

struct program_statistics {
    uint64_t run_time_ns, run_count, misses;
    uint32_t verified_instructions;
};

static int spanloom_program_statistics(int program_fd, struct program_statistics *statistics)
{
    struct bpf_prog_info info = {};
    uint32_t length = sizeof(info);
    int error = bpf_obj_get_info_by_fd(program_fd, &info, &length);

    statistics->run_time_ns = info.run_time_ns;
    statistics->run_count = info.run_cnt;
    statistics->misses = info.recursion_misses;
    statistics->verified_instructions = info.verified_insns;
    return error;
}

/* Attaches to every process's calls of the function at an offset of a file. */
static struct bpf_link *spanloom_attach_uprobe_at(struct bpf_program *program, const char *path, size_t offset,
                                                  bool is_return)
{
    LIBBPF_OPTS(bpf_uprobe_opts, options, .retprobe = is_return);

    return bpf_program__attach_uprobe_opts(program, -1, path, offset, &options);
}

/* Linux 6.6 and later (kernel commit 89ae89f53d20) attach uprobes through links of their own kind, which neither the
 * libbpf nor the kernel headers of Debian 12 know: part of `union bpf_attr` for BPF_LINK_CREATE. */
struct uprobe_link {
    uint32_t program_fd, target_fd, attach_type, flags;
    uint64_t path, offsets, reference_counters, cookies;
    uint32_t count, uprobe_flags, pid, padding;
};

/* Attaches a program that was loaded with UPROBE_LINK to every process's calls of the function at an offset of a file.
 * Returns the link's descriptor, or -errno. Against a perf event per probe: links are taken back side by side, where
 * perf events wait for one lock, each for a grace period (0.1 s); CAP_BPF and CAP_PERFMON are enough for them. */
static int spanloom_link_uprobe(int program_fd, const char *path, uint64_t offset, bool is_return)
{
    struct uprobe_link link = {
        .program_fd = program_fd,
        .attach_type = UPROBE_LINK,
        .path = (uintptr_t)path,
        .offsets = (uintptr_t)&offset,
        .count = 1,
        .uprobe_flags = is_return, /* BPF_F_UPROBE_MULTI_RETURN */
    };
    int descriptor = syscall(__NR_bpf, BPF_LINK_CREATE, &link, sizeof(link));

    return descriptor < 0 ? -errno : descriptor;
}

/* Whether this kernel has such links: it must get as far as to find that a directory is no file to probe. */
static bool spanloom_links_uprobes(void)
{
    const struct bpf_insn nothing[] = {
        { .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0 },
        { .code = BPF_JMP | BPF_EXIT },
    };
    LIBBPF_OPTS(bpf_prog_load_opts, options, .expected_attach_type = UPROBE_LINK);
    int program = bpf_prog_load(BPF_PROG_TYPE_KPROBE, "uprobe_links", "Dual BSD/GPL", nothing, 2, &options);
    int error;

    if (program < 0)
        return false;
    error = spanloom_link_uprobe(program, "/", 0, false);
    close(program);
    return error == -EBADF;
}

/* A function to put probes on, in a process that has nothing to lose. */
__attribute__((noinline, visibility("default"))) int spanloom_canary(int number)
{
    __asm__ volatile("" : "+r"(number));
    return number + 1;
}

/* Calls it in a child whose seccomp filter allows nothing but to end, as strict filters of containers would. Returns 0
 * when the child went on as if there were no probes, the signal that ended it, or -1 when it could not be tried. */
static int spanloom_canary_under_filter(void)
{
    struct sock_filter instructions[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_exit_group, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
    };
    struct sock_fprog filter = { .len = sizeof(instructions) / sizeof(instructions[0]), .filter = instructions };
    struct rlimit no_core = { 0, 0 };
    int status;
    pid_t child = fork();

    if (child < 0)
        return -1;
    if (!child) {
        setrlimit(RLIMIT_CORE, &no_core);
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter))
            _exit(1);
        _exit(spanloom_canary(41) == 42 ? 0 : 2);
    }
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return -1;
    if (WIFSIGNALED(status))
        return WTERMSIG(status);
    return WEXITSTATUS(status) == 1 ? -1 : WEXITSTATUS(status);
}

/* Parses BTF and returns the number of its types, or -errno. */
static long spanloom_btf_types(const char *path)
{
    struct btf *btf = btf__parse(path, NULL);
    long count;

    if (!btf)
        return -errno;
    count = btf__type_cnt(btf);
    btf__free(btf);
    return count;
}

/* The index of the first type that the running kernel's BTF has not, such as the typedefs btf_trace_* that tracepoints
 * leave behind; -1 when it has all. */
static int spanloom_missing_types(const char *const *names, const uint32_t *kinds, int count)
{
    struct btf *btf = btf__load_vmlinux_btf();
    int index = 0;

    while (btf && index < count && btf__find_by_name_kind(btf, names[index], kinds[index]) > 0)
        index++;
    btf__free(btf);
    return index < count ? index : -1;
}

/* Bytes of machine code that the kernel made of a program: 0 when it interprets it; -errno. */
static long spanloom_jited_bytes(int program_fd)
{
    struct bpf_prog_info info = {};
    uint32_t length = sizeof(info);

    return bpf_obj_get_info_by_fd(program_fd, &info, &length) ? -errno : (long)info.jited_prog_len;
}

/* Makes the allocator return large blocks when they are freed, and keep one heap for all threads: export requests of a
 * megabyte come and go, and by default glibc learns to hold on to them, per thread. */
static void spanloom_give_memory_back(void)
{
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 256 << 10);
    mallopt(M_ARENA_MAX, 1);
    malloc_trim(0);
#endif
}

static long spanloom_bpf(int command, void *attributes, unsigned int bytes)
{
    long result = syscall(__NR_bpf, command, attributes, bytes);

    return result < 0 ? -errno : result;
}
""",
    libraries=["bpf"],
    extra_compile_args=["-O2", "-Wall"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
