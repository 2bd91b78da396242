/*
 * The smallest Sidelane plugin in C: protocol type LINEC, born from a listener's bytes, carries them to
 * the service and back as they are, each direction closed on its own.
 *
 * A future is a struct with a state and a `poll` that goes on from it. A poll never blocks: it returns
 * PENDING once nothing more can be done, and whatever it last polled keeps the waker. Every owned
 * object is dropped once: when it is no longer needed, or with the future.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "sidelane_plugin.h"

/* Bytes read from the stream at once: the largest data message of the tunnel. */
#define CHUNK_BYTES_MAX ((size_t)32 * 1024)

/* Chunks moved per direction before other tasks of the thread have their turn. */
#define CHUNKS_PER_POLL 16

/* ---- Buffers ---------------------------------------------------------------------------------- */

/* A reference-counted block; atomics because a buffer's owners may be on different threads. */
typedef struct {
    _Atomic size_t owners;
    uint8_t bytes[];
} block_t;

static sidelane_owned_buf_t block_clone(const sidelane_owned_buf_t *buf) {
    ((block_t *)buf->data)->owners++;
    return *buf;
}

static void block_drop(void *data) {
    block_t *block = data;
    if (--block->owners == 0) {
        free(block);
    }
}

static const sidelane_buf_vt_t BLOCK_VT = {sizeof(BLOCK_VT), block_clone, block_drop};

static sidelane_owned_buf_t buf_empty(void) {
    sidelane_owned_buf_t buf = {NULL, 0, NULL, NULL};
    return buf;
}

/* Returns a copy; empty where there is no memory. */
static sidelane_owned_buf_t buf_copy(const void *bytes, size_t len) {
    block_t *block = len > 0 ? malloc(sizeof(block_t) + len) : NULL;
    if (block == NULL) {
        return buf_empty();
    }
    block->owners = 1;
    memcpy(block->bytes, bytes, len);
    sidelane_owned_buf_t buf = {block->bytes, len, block, &BLOCK_VT};
    return buf;
}

static void buf_drop(sidelane_owned_buf_t *buf) {
    if (buf->vt != NULL) {
        buf->vt->drop(buf->data);
    }
    *buf = buf_empty();
}

/* ---- Joining an exchange and a byte stream ----------------------------------------------------- */

typedef enum { STEP_OPENING, STEP_CONNECTING, STEP_JOINING } step_t;

/* The future of both ends. What it owns is said by `has_*`. */
typedef struct {
    step_t step;
    bool relay;

    bool has_opener, has_service, has_connect, has_stream, has_exchange;
    sidelane_owned_opener_t opener;
    sidelane_owned_service_t service;
    sidelane_owned_future_t connect;
    sidelane_owned_io_t stream;
    sidelane_owned_exchange_t exchange;

    /* Stream to exchange. */
    bool up_ended;
    sidelane_owned_msg_t up;
    bool up_waiting;

    /* Exchange to stream. */
    bool down_last, down_flushing, down_ended, dispatched;
    sidelane_owned_buf_t down;
} join_t;

static sidelane_reset_t reset_of(uint32_t code) {
    sidelane_reset_t reset = {code, SIDELANE_NO_PROTOCOL_CODE};
    return reset;
}

static void join_drop(void *data) {
    join_t *join = data;
    if (join->has_opener) {
        join->opener.vt->drop(join->opener.data);
    }
    if (join->has_connect) {
        join->connect.vt->drop(join->connect.data);
    }
    if (join->has_service) {
        join->service.vt->drop(join->service.data);
    }
    if (join->has_stream) {
        join->stream.vt->drop(join->stream.data);
    }
    if (join->has_exchange) {
        join->exchange.send.vt->drop(join->exchange.send.data);
        join->exchange.recv.vt->drop(join->exchange.recv.data);
    }
    if (join->up_waiting) {
        buf_drop(&join->up.body);
    }
    buf_drop(&join->down);
    free(join);
}

/* The handler has ended with `code`: tells the peer where that matters. */
static uint32_t ended(join_t *join, uint32_t code, void *out) {
    if (code != SIDELANE_FAILURE_NONE && join->has_exchange) {
        join->exchange.send.vt->reset(join->exchange.send.data, reset_of(code));
    }
    *(uint32_t *)out = code;
    return SIDELANE_POLL_READY;
}

static uint32_t stream_failure(const join_t *join) {
    return join->relay ? SIDELANE_FAILURE_CLIENT_GONE : SIDELANE_FAILURE_SERVICE_RESET;
}

/* Moves bytes from the stream to the exchange. PENDING, READY (this direction has ended), or CLOSED
 * with `code` filled. */
static uint32_t poll_up(join_t *join, const sidelane_waker_t *waker, uint32_t *code) {
    const sidelane_send_vt_t *send = join->exchange.send.vt;
    for (int i = 0; i < CHUNKS_PER_POLL && !join->up_ended; i++) {
        if (join->up_waiting) {
            uint32_t sent = send->poll_send(join->exchange.send.data, waker, &join->up);
            if (sent == SIDELANE_POLL_PENDING) {
                return SIDELANE_POLL_PENDING;
            }
            if (sent != SIDELANE_POLL_READY) {
                *code = SIDELANE_FAILURE_CANCELLED;
                return SIDELANE_POLL_CLOSED;
            }
            join->up_waiting = false;
        }
        uint8_t room[CHUNK_BYTES_MAX];
        sidelane_io_res_t got = join->stream.vt->poll_read(join->stream.data, waker, room, sizeof(room));
        if (got.tag == SIDELANE_POLL_PENDING) {
            return SIDELANE_POLL_PENDING;
        }
        if (got.tag != SIDELANE_POLL_READY) {
            *code = stream_failure(join);
            return SIDELANE_POLL_CLOSED;
        }
        if (got.n == 0) {
            join->up_ended = true;
            send->finish(join->exchange.send.data);
            break;
        }
        join->up.field = SIDELANE_FIELD_CUSTOM;
        join->up.flags = 0;
        join->up.head = buf_empty();
        join->up.body = buf_copy(room, got.n);
        if (join->up.body.len == 0) {
            *code = SIDELANE_FAILURE_OVERLOADED;
            return SIDELANE_POLL_CLOSED;
        }
        join->up_waiting = true;
    }
    if (join->up_ended) {
        return SIDELANE_POLL_READY;
    }
    waker->vt->wake(waker);
    return SIDELANE_POLL_PENDING;
}

/* Moves bytes from the exchange to the stream; as `poll_up`. */
static uint32_t poll_down(join_t *join, const sidelane_waker_t *waker, uint32_t *code) {
    const sidelane_io_vt_t *io = join->stream.vt;
    for (int i = 0; i < CHUNKS_PER_POLL && !join->down_ended; i++) {
        sidelane_io_res_t did;
        if (join->down.len > 0) {
            sidelane_io_vec_t part = {join->down.ptr, join->down.len};
            did = io->poll_writev(join->stream.data, waker, &part, 1);
            if (did.tag == SIDELANE_POLL_READY && did.n > 0) {
                join->down.ptr += did.n;
                join->down.len -= did.n;
                join->down_flushing = true;
                continue;
            }
        } else if (join->down_last) {
            buf_drop(&join->down);
            did = io->poll_shutdown(join->stream.data, waker);
            if (did.tag == SIDELANE_POLL_READY) {
                join->down_ended = true;
                continue;
            }
        } else {
            sidelane_owned_msg_t message;
            sidelane_reset_t reset;
            buf_drop(&join->down);
            switch (join->exchange.recv.vt->poll_recv(join->exchange.recv.data, waker, &message, &reset)) {
            case SIDELANE_RECV_MESSAGE:
                join->down = message.body;
                join->down_last = (message.flags & SIDELANE_MSG_END) != 0;
                buf_drop(&message.head);
                if (!join->relay && !join->dispatched && join->down.len > 0) {
                    join->dispatched = true;
                    join->exchange.send.vt->dispatched(join->exchange.send.data);
                }
                continue;
            case SIDELANE_RECV_FINISHED:
                join->down_last = true;
                continue;
            case SIDELANE_RECV_RESET:
                *code = reset.code;
                return SIDELANE_POLL_CLOSED;
            default:
                break;
            }
            if (!join->down_flushing) {
                return SIDELANE_POLL_PENDING;
            }
            did = io->poll_flush(join->stream.data, waker);
            if (did.tag == SIDELANE_POLL_READY) {
                join->down_flushing = false;
                return SIDELANE_POLL_PENDING;
            }
        }
        if (did.tag == SIDELANE_POLL_PENDING) {
            return SIDELANE_POLL_PENDING;
        }
        *code = stream_failure(join);
        return SIDELANE_POLL_CLOSED;
    }
    if (join->down_ended) {
        return SIDELANE_POLL_READY;
    }
    waker->vt->wake(waker);
    return SIDELANE_POLL_PENDING;
}

static uint32_t join_poll(void *data, const sidelane_waker_t *waker, void *out) {
    join_t *join = data;
    uint32_t code = SIDELANE_FAILURE_NONE;

    if (join->step == STEP_OPENING) {
        sidelane_route_key_t key = {sizeof(key), SIDELANE_ROUTE_KEY_LISTENER, {NULL, 0}, {NULL, 0}};
        sidelane_opened_t opened;
        switch (join->opener.vt->poll_open(join->opener.data, waker, &key, &opened)) {
        case SIDELANE_POLL_PENDING:
            return SIDELANE_POLL_PENDING;
        case SIDELANE_POLL_READY:
            join->exchange = opened.exchange;
            join->has_exchange = true;
            join->step = STEP_JOINING;
            break;
        case SIDELANE_POLL_CLOSED:
            /* This protocol has no words for a failure: the connection is closed. */
            join->has_stream = false;
            join->stream.vt->drop(join->stream.data);
            return ended(join, opened.failure.code, out);
        default:
            return ended(join, SIDELANE_FAILURE_INTERNAL, out);
        }
    }
    if (join->step == STEP_CONNECTING) {
        sidelane_io_outcome_t outcome;
        uint32_t connected = join->connect.vt->poll(join->connect.data, waker, &outcome);
        if (connected == SIDELANE_POLL_PENDING) {
            /* Meanwhile the exchange may be reset. */
            sidelane_reset_t reset;
            if (join->exchange.send.vt->poll_closed(join->exchange.send.data, waker, &reset) ==
                SIDELANE_POLL_CLOSED) {
                return ended(join, reset.code, out);
            }
            return SIDELANE_POLL_PENDING;
        }
        if (connected != SIDELANE_POLL_READY) {
            return ended(join, SIDELANE_FAILURE_INTERNAL, out);
        }
        if (outcome.code != SIDELANE_FAILURE_NONE) {
            join->exchange.send.vt->refused(join->exchange.send.data, reset_of(outcome.code));
            return ended(join, outcome.code, out);
        }
        join->stream = outcome.io;
        join->has_stream = true;
        join->step = STEP_JOINING;
    }

    uint32_t down = poll_down(join, waker, &code);
    uint32_t up = down == SIDELANE_POLL_CLOSED ? down : poll_up(join, waker, &code);
    if (up == SIDELANE_POLL_CLOSED) {
        return ended(join, code, out);
    }
    if (down == SIDELANE_POLL_READY && up == SIDELANE_POLL_READY) {
        return ended(join, SIDELANE_FAILURE_NONE, out);
    }
    /* A slow stream keeps the receiving direction from being read; a reset is seen here. */
    sidelane_reset_t reset;
    if (join->exchange.send.vt->poll_closed(join->exchange.send.data, waker, &reset) ==
            SIDELANE_POLL_CLOSED &&
        reset.code != SIDELANE_FAILURE_NONE) {
        return ended(join, reset.code, out);
    }
    /* Complete on the wire is no failure: what was received is still to be written. */
    return SIDELANE_POLL_PENDING;
}

static const sidelane_future_vt_t JOIN_VT = {sizeof(JOIN_VT), join_poll, join_drop};

/* ---- Futures that are done from the start ------------------------------------------------------- */

static uint32_t done_poll(void *data, const sidelane_waker_t *waker, void *out) {
    (void)data;
    (void)waker;
    *(uint32_t *)out = SIDELANE_FAILURE_NONE;
    return SIDELANE_POLL_READY;
}

static uint32_t overloaded_poll(void *data, const sidelane_waker_t *waker, void *out) {
    (void)data;
    (void)waker;
    *(uint32_t *)out = SIDELANE_FAILURE_OVERLOADED;
    return SIDELANE_POLL_READY;
}

static void drop_nothing(void *data) {
    (void)data;
}

static const sidelane_future_vt_t DONE_VT = {sizeof(DONE_VT), done_poll, drop_nothing};
static const sidelane_future_vt_t OVERLOADED_VT = {sizeof(OVERLOADED_VT), overloaded_poll, drop_nothing};

static sidelane_owned_future_t future(void *data, const sidelane_future_vt_t *vt) {
    sidelane_owned_future_t made = {data, vt};
    return made;
}

/* ---- The plugin's functions --------------------------------------------------------------------- */

/* An instance; it has nothing to keep. */
typedef struct {
    const sidelane_host_t *host;
} plugin_t;

/* Whether JSON text is `null` or an empty object. */
static bool is_empty_block(sidelane_borrowed_bytes_t json) {
    uint8_t bytes[4];
    size_t len = 0;
    for (size_t i = 0; i < json.len; i++) {
        if (memchr(" \t\r\n", json.ptr[i], 4) != NULL) {
            continue;
        }
        if (len == sizeof(bytes)) {
            return false;
        }
        bytes[len++] = json.ptr[i];
    }
    return len == 0 || (len == 4 && memcmp(bytes, "null", 4) == 0) ||
           (len == 2 && memcmp(bytes, "{}", 2) == 0);
}

static void refuse_block(sidelane_error_out_t *error, const char *text) {
    error->message = buf_copy(text, strlen(text));
}

static void *create(const sidelane_host_t *host, sidelane_borrowed_bytes_t config,
                    sidelane_error_out_t *error) {
    if (!is_empty_block(config)) {
        refuse_block(error, "the LINEC plugin has no settings");
        return NULL;
    }
    plugin_t *plugin = malloc(sizeof(*plugin));
    if (plugin == NULL) {
        refuse_block(error, "out of memory");
        return NULL;
    }
    plugin->host = host;
    return plugin;
}

static uint32_t validate_route(void *plugin, uint32_t protocol, sidelane_borrowed_bytes_t options,
                               sidelane_error_out_t *error) {
    (void)plugin;
    (void)protocol;
    if (is_empty_block(options)) {
        return 1;
    }
    refuse_block(error, "LINEC has no options");
    return 0;
}

static uint32_t sniff(void *plugin, uint32_t protocol, sidelane_borrowed_bytes_t bytes,
                      sidelane_borrowed_bytes_t *host) {
    (void)plugin;
    (void)protocol;
    (void)bytes;
    (void)host;
    return SIDELANE_SNIFF_NO;
}

static sidelane_owned_future_t accept_stream(void *plugin, uint32_t protocol, const sidelane_meta_t *meta,
                                             sidelane_owned_io_t client, sidelane_owned_opener_t opener) {
    (void)plugin;
    (void)protocol;
    (void)meta;
    join_t *join = calloc(1, sizeof(*join));
    if (join == NULL) {
        client.vt->drop(client.data);
        opener.vt->drop(opener.data);
        return future(NULL, &OVERLOADED_VT);
    }
    join->step = STEP_OPENING;
    join->relay = true;
    join->opener = opener;
    join->has_opener = true;
    join->stream = client;
    join->has_stream = true;
    return future(join, &JOIN_VT);
}

static sidelane_owned_future_t deliver(void *plugin, uint32_t protocol, const sidelane_meta_t *meta,
                                       sidelane_owned_exchange_t exchange,
                                       sidelane_owned_service_t service) {
    (void)plugin;
    (void)protocol;
    (void)meta;
    join_t *join = calloc(1, sizeof(*join));
    if (join == NULL) {
        exchange.send.vt->refused(exchange.send.data, reset_of(SIDELANE_FAILURE_OVERLOADED));
        exchange.send.vt->drop(exchange.send.data);
        exchange.recv.vt->drop(exchange.recv.data);
        service.vt->drop(service.data);
        return future(NULL, &OVERLOADED_VT);
    }
    join->step = STEP_CONNECTING;
    join->exchange = exchange;
    join->has_exchange = true;
    join->connect = service.vt->connect(service.data);
    join->has_connect = true;
    join->service = service;
    join->has_service = true;
    return future(join, &JOIN_VT);
}

static sidelane_owned_future_t refuse_stream(void *plugin, uint32_t protocol, sidelane_owned_io_t client,
                                             const sidelane_failure_t *failure) {
    (void)plugin;
    (void)protocol;
    (void)failure;
    client.vt->drop(client.data);
    return future(NULL, &DONE_VT);
}

static void drain(void *plugin, uint64_t deadline_ns) {
    (void)plugin;
    (void)deadline_ns;
}

static void destroy(void *plugin) {
    free(plugin);
}

static const sidelane_type_desc_t TYPES[] = {
    {{(const uint8_t *)"LINEC", 5}, SIDELANE_BORN_BYTES},
};

static const sidelane_plugin_vt_t PLUGIN_VT = {
    .size = sizeof(PLUGIN_VT),
    .types = TYPES,
    .types_len = sizeof(TYPES) / sizeof(TYPES[0]),
    .create = create,
    .validate_route = validate_route,
    .sniff = sniff,
    .accept_stream = accept_stream,
    .deliver = deliver,
    .refuse_stream = refuse_stream,
    .drain = drain,
    .destroy = destroy,
};

const sidelane_stamp_t sidelane_plugin_stamp = {
    .magic = SIDELANE_MAGIC,
    .size = sizeof(sidelane_stamp_t),
    .abi_major = SIDELANE_ABI_MAJOR,
    .abi_minor = SIDELANE_ABI_MINOR,
    .panic = SIDELANE_PANIC_STRATEGY_NONE,
    .name = "line-c",
    .version = "0.1.0",
    .toolchain = "cc " __VERSION__,
    .plugin = &PLUGIN_VT,
};
