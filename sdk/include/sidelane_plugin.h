/*
 * The C ABI between the Sidelane host and a protocol plugin: the contract of `sdk/abi` in C. A test
 * (`sdk/abi/tests/header.rs`) holds the two against each other, type by type.
 *
 * A plugin is a shared library that exports one symbol, a constant:
 *
 *     const sidelane_stamp_t sidelane_plugin_stamp = { ... };
 *
 * `examples/plugins/line-c` is a whole one; `docs/plugin-guide.md` explains.
 *
 * Ownership. `sidelane_owned_*_t` passed by value is moved: the receiver calls its vtable's `drop`
 * exactly once. `sidelane_borrowed_bytes_t`, and whatever is passed by pointer to const, is borrowed:
 * for the call, or for as long as the field or function says. Memory is freed by the side that made
 * it, through its vtable.
 *
 * Threads. Everything moved may be sent to another thread. One object is used by one thread at a
 * time. A plugin's entry points are called concurrently. No call blocks.
 *
 * Polling. A `poll_*` that returns SIDELANE_POLL_PENDING has kept (retained) the waker and calls it
 * once progress can be made. `waker` is never null and is borrowed for the call.
 *
 * Failing. Exceptions and panics never cross: each side catches its own. A plugin reports one as
 * SIDELANE_POLL_PANICKED.
 *
 * Versions. Every vtable and every struct passed by pointer begins with its `size`. Slots are
 * appended, never changed; a reader treats a slot at or beyond `size` as absent. Structs passed by
 * value are frozen within a major version. A host takes plugins of SIDELANE_ABI_MINOR_OLDEST to
 * SIDELANE_ABI_MINOR; what a minor version added says so ("since 0.3").
 */
#ifndef SIDELANE_PLUGIN_H
#define SIDELANE_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sidelane_stamp sidelane_stamp_t;
typedef struct sidelane_borrowed_bytes sidelane_borrowed_bytes_t;
typedef struct sidelane_owned_buf sidelane_owned_buf_t;
typedef struct sidelane_buf_vt sidelane_buf_vt_t;
typedef struct sidelane_waker sidelane_waker_t;
typedef struct sidelane_waker_vt sidelane_waker_vt_t;
typedef struct sidelane_owned_future sidelane_owned_future_t;
typedef struct sidelane_future_vt sidelane_future_vt_t;
typedef struct sidelane_io_res sidelane_io_res_t;
typedef struct sidelane_io_vec sidelane_io_vec_t;
typedef struct sidelane_owned_io sidelane_owned_io_t;
typedef struct sidelane_io_vt sidelane_io_vt_t;
typedef struct sidelane_owned_timer sidelane_owned_timer_t;
typedef struct sidelane_timer_vt sidelane_timer_vt_t;
typedef struct sidelane_failure sidelane_failure_t;
typedef struct sidelane_reset sidelane_reset_t;
typedef struct sidelane_header sidelane_header_t;
typedef struct sidelane_request_head sidelane_request_head_t;
typedef struct sidelane_response_head sidelane_response_head_t;
typedef struct sidelane_owned_body sidelane_owned_body_t;
typedef struct sidelane_frame sidelane_frame_t;
typedef struct sidelane_body_vt sidelane_body_vt_t;
typedef struct sidelane_owned_responder sidelane_owned_responder_t;
typedef struct sidelane_responder_vt sidelane_responder_vt_t;
typedef struct sidelane_io_outcome sidelane_io_outcome_t;
typedef struct sidelane_alpn_outcome sidelane_alpn_outcome_t;
typedef struct sidelane_owned_msg sidelane_owned_msg_t;
typedef struct sidelane_owned_send_half sidelane_owned_send_half_t;
typedef struct sidelane_send_vt sidelane_send_vt_t;
typedef struct sidelane_dedicate_outcome sidelane_dedicate_outcome_t;
typedef struct sidelane_owned_recv_half sidelane_owned_recv_half_t;
typedef struct sidelane_recv_vt sidelane_recv_vt_t;
typedef struct sidelane_owned_exchange sidelane_owned_exchange_t;
typedef struct sidelane_meta sidelane_meta_t;
typedef struct sidelane_route_key sidelane_route_key_t;
typedef struct sidelane_opened sidelane_opened_t;
typedef struct sidelane_owned_opener sidelane_owned_opener_t;
typedef struct sidelane_opener_vt sidelane_opener_vt_t;
typedef struct sidelane_owned_service sidelane_owned_service_t;
typedef struct sidelane_service_vt sidelane_service_vt_t;
typedef struct sidelane_service_settings sidelane_service_settings_t;
typedef struct sidelane_host sidelane_host_t;
typedef struct sidelane_host_vt sidelane_host_vt_t;
typedef struct sidelane_splice_outcome sidelane_splice_outcome_t;
typedef struct sidelane_error_out sidelane_error_out_t;
typedef struct sidelane_type_desc sidelane_type_desc_t;
typedef struct sidelane_plugin_vt sidelane_plugin_vt_t;

/* Major version. Different majors do not load. */
#define SIDELANE_ABI_MAJOR 0u

/* Minor version. A plugin's may not exceed its host's. */
#define SIDELANE_ABI_MINOR 5u

/* Oldest minor version that a host of this one takes: what came since was only appended. */
#define SIDELANE_ABI_MINOR_OLDEST 2u

/* First bytes of every sidelane_stamp_t. */
#define SIDELANE_MAGIC "sidelane-plugin"

/* Panic strategy of the plugin's code, in sidelane_stamp_t.panic. */
/* Unwinds: a panic is caught at the boundary. */
#define SIDELANE_PANIC_STRATEGY_UNWIND 1u
/* Aborts the process: refused by the host. */
#define SIDELANE_PANIC_STRATEGY_ABORT 2u
/* The language has no panics (C). */
#define SIDELANE_PANIC_STRATEGY_NONE 3u

/* What a plugin says of itself. Plain data, read from the library's file before it is mapped,
 * so nothing but sidelane_stamp_t.plugin may need a relocation. */
struct sidelane_stamp {
    /* SIDELANE_MAGIC. */
    uint8_t magic[16];
    /* `sizeof(sidelane_stamp_t)` as the plugin was compiled. */
    uint32_t size;
    /* SIDELANE_ABI_MAJOR the plugin was compiled against. */
    uint32_t abi_major;
    /* SIDELANE_ABI_MINOR the plugin was compiled against. */
    uint32_t abi_minor;
    /* One of SIDELANE_PANIC_STRATEGY_*. */
    uint32_t panic;
    /* Plugin's name, NUL padded UTF-8. */
    uint8_t name[64];
    /* Plugin's version, NUL padded UTF-8. */
    uint8_t version[32];
    /* Compiler that built it, NUL padded UTF-8. */
    uint8_t toolchain[96];
    /* The plugin's functions. */
    const sidelane_plugin_vt_t *plugin;
};

/* Borrowed bytes; UTF-8 where the field says text. `ptr` may be null where `len` is 0. */
struct sidelane_borrowed_bytes {
    /* First byte. */
    const uint8_t *ptr;
    /* Length in bytes. */
    size_t len;
};

/* Owned, reference-counted, immutable bytes. Whoever owns it may narrow `ptr` and `len` within
 * the range it got. `vt` null: static memory, nothing to drop, copied freely. */
struct sidelane_owned_buf {
    /* First byte. */
    const uint8_t *ptr;
    /* Length in bytes. */
    size_t len;
    /* The maker's own. */
    void *data;
    /* The maker's functions; null for static memory. */
    const sidelane_buf_vt_t *vt;
};

/* Functions of a sidelane_owned_buf_t. */
struct sidelane_buf_vt {
    /* `sizeof(sidelane_buf_vt_t)`. */
    size_t size;
    /* Returns another owner of the same bytes (`ptr`, `len` as in `buf`). */
    sidelane_owned_buf_t (*clone)(const sidelane_owned_buf_t *buf);
    /* Ends one owner. Does not look at `ptr` and `len`. */
    void (*drop)(void *data);
};

/* A reference-counted waker; the implementer's fields follow. Always used by pointer. */
struct sidelane_waker {
    /* The implementer's functions. */
    const sidelane_waker_vt_t *vt;
};

/* Functions of a sidelane_waker_t. May be called from any thread. */
struct sidelane_waker_vt {
    /* `sizeof(sidelane_waker_vt_t)`. */
    size_t size;
    /* Adds an owner. */
    void (*retain)(const sidelane_waker_t *waker);
    /* Ends an owner. */
    void (*release)(const sidelane_waker_t *waker);
    /* Asks for another poll; keeps the ownership. */
    void (*wake)(const sidelane_waker_t *waker);
};

/* Tags that any `poll_*` may return. Others are named where they are returned. */
/* Not yet; the waker was kept. */
#define SIDELANE_POLL_PENDING 0u
/* Done. */
#define SIDELANE_POLL_READY 1u
/* The other side of the object is gone; details are in the sidelane_reset_t that the call fills, if
 * any. */
#define SIDELANE_POLL_CLOSED 2u
/* The callee panicked; the object may only be dropped. */
#define SIDELANE_POLL_PANICKED UINT32_MAX

/* A future. `out` of its poll is typed by the function that returned it. */
struct sidelane_owned_future {
    /* The maker's own. */
    void *data;
    /* The maker's functions. */
    const sidelane_future_vt_t *vt;
};

/* Functions of a sidelane_owned_future_t. */
struct sidelane_future_vt {
    /* `sizeof(sidelane_future_vt_t)`. */
    size_t size;
    /* SIDELANE_POLL_PENDING, SIDELANE_POLL_READY (then `out` is filled) or
     * SIDELANE_POLL_PANICKED. Not called again after either of the last two. */
    uint32_t (*poll)(void *data, const sidelane_waker_t *waker, void *out);
    /* Cancels where it is not done. What was moved into the future is dropped with it. */
    void (*drop)(void *data);
};

/* Result of a sidelane_io_vt_t call. */
struct sidelane_io_res {
    /* SIDELANE_POLL_PENDING, SIDELANE_POLL_READY or SIDELANE_IO_ERROR. */
    uint32_t tag;
    /* `errno` where `tag` is SIDELANE_IO_ERROR, else 0. */
    int32_t err;
    /* Bytes moved; 0 from `poll_read` is the end of the stream. */
    size_t n;
};

/* Tags of sidelane_io_res_t beside those of SIDELANE_POLL_*. */
/* Failed; `err` says why. */
#define SIDELANE_IO_ERROR 3u

/* One element of a vectored write; the layout of POSIX `struct iovec`. */
struct sidelane_io_vec {
    /* First byte. */
    const uint8_t *ptr;
    /* Length in bytes. */
    size_t len;
};

/* A byte stream, each direction closed on its own. */
struct sidelane_owned_io {
    /* The maker's own. */
    void *data;
    /* The maker's functions. */
    const sidelane_io_vt_t *vt;
};

/* Functions of a sidelane_owned_io_t. One read and one write may be pending at once, each
 * with its own waker. */
struct sidelane_io_vt {
    /* `sizeof(sidelane_io_vt_t)`. */
    size_t size;
    /* Reads up to `len` bytes into `ptr`. */
    sidelane_io_res_t (*poll_read)(
        void *data, const sidelane_waker_t *waker, uint8_t *ptr, size_t len);
    /* Writes from `count` (at least 1, at most 64) elements. */
    sidelane_io_res_t (*poll_writev)(
        void *data, const sidelane_waker_t *waker, const sidelane_io_vec_t *iov, size_t count);
    /* Pushes out what the implementer buffered. */
    sidelane_io_res_t (*poll_flush)(void *data, const sidelane_waker_t *waker);
    /* Flushes and ends the write direction; reading goes on. */
    sidelane_io_res_t (*poll_shutdown)(void *data, const sidelane_waker_t *waker);
    /* Closes both directions. */
    void (*drop)(void *data);
};

/* A timer that can be set again. Fires once per deadline. */
struct sidelane_owned_timer {
    /* The host's own. */
    void *data;
    /* The host's functions. */
    const sidelane_timer_vt_t *vt;
};

/* Functions of a sidelane_owned_timer_t. */
struct sidelane_timer_vt {
    /* `sizeof(sidelane_timer_vt_t)`. */
    size_t size;
    /* SIDELANE_POLL_READY once the deadline has passed. */
    uint32_t (*poll)(void *data, const sidelane_waker_t *waker);
    /* Sets another deadline, on the clock of sidelane_host_vt_t.now. */
    void (*reset)(void *data, uint64_t deadline_ns);
    /* Ends it. */
    void (*drop)(void *data);
};

/* Why something failed or ended early: the rows of the failure table and the reset codes, one
 * numbering for ABI, tunnel, logs and the `x-sidelane-error` header. */
/* No failure. */
#define SIDELANE_FAILURE_NONE 0u
/* The other end no longer wants it. */
#define SIDELANE_FAILURE_CANCELLED 1u
/* No route takes the name or path. */
#define SIDELANE_FAILURE_NO_ROUTE 2u
/* The route's tunnel has no sidecar connected. */
#define SIDELANE_FAILURE_NO_SIDECAR 3u
/* No connected sidecar, or no loaded plugin, carries the protocol. */
#define SIDELANE_FAILURE_NO_PROTOCOL 4u
/* The service refused the connection, or could not be reached. */
#define SIDELANE_FAILURE_SERVICE_UNREACHABLE 5u
/* The service closed or reset the exchange before it was complete. */
#define SIDELANE_FAILURE_SERVICE_RESET 6u
/* The service sent what its protocol does not allow. */
#define SIDELANE_FAILURE_SERVICE_INVALID 7u
/* The service was too slow. */
#define SIDELANE_FAILURE_SERVICE_TIMEOUT 8u
/* Over a rate. */
#define SIDELANE_FAILURE_RATE_LIMITED 9u
/* Over a limit on load: exchanges, sessions, bytes queued. */
#define SIDELANE_FAILURE_OVERLOADED 10u
/* A head, message or body is larger than allowed. */
#define SIDELANE_FAILURE_TOO_LARGE 11u
/* The tunnel was lost for longer than its grace. */
#define SIDELANE_FAILURE_TUNNEL_LOST 12u
/* The client closed or reset the exchange. */
#define SIDELANE_FAILURE_CLIENT_GONE 13u
/* The client sent what its protocol does not allow. */
#define SIDELANE_FAILURE_BAD_REQUEST 14u
/* A peer ignored its credit. */
#define SIDELANE_FAILURE_FLOW_CONTROL 15u
/* The plugin failed (error or panic) or is quarantined. */
#define SIDELANE_FAILURE_PLUGIN_FAILED 16u
/* This end is going away. */
#define SIDELANE_FAILURE_DRAINING 17u
/* The credential does not allow it. */
#define SIDELANE_FAILURE_FORBIDDEN 18u
/* A defect on our side. */
#define SIDELANE_FAILURE_INTERNAL 19u
/* The host or the transport cannot do it. */
#define SIDELANE_FAILURE_UNSUPPORTED 20u
/* The client was too slow. */
#define SIDELANE_FAILURE_CLIENT_TIMEOUT 21u
/* The client did not say who it is, or not truly. */
#define SIDELANE_FAILURE_UNAUTHORIZED 22u
/* The connection is not for the host that was asked for: TLS was agreed on for another name. */
#define SIDELANE_FAILURE_MISDIRECTED 23u

/* A failure with what a client may be told of it. */
struct sidelane_failure {
    /* `sizeof(sidelane_failure_t)`. */
    size_t size;
    /* One of SIDELANE_FAILURE_*. */
    uint32_t code;
    /* Seconds for `Retry-After`; 0: none. */
    uint32_t retry_after_s;
    /* One line of text for people; borrowed as the call says. */
    sidelane_borrowed_bytes_t detail;
};

/* Why a direction or a stream ended early. */
struct sidelane_reset {
    /* One of SIDELANE_FAILURE_*. */
    uint32_t code;
    /* The protocol's own code where it has one (HTTP/2's error code), passed as sent;
     * SIDELANE_NO_PROTOCOL_CODE where not. */
    uint32_t protocol_code;
};

/* sidelane_reset_t.protocol_code where there is none. */
#define SIDELANE_NO_PROTOCOL_CODE UINT32_MAX

/* Unknown length, in the fields that say so. */
#define SIDELANE_LENGTH_UNKNOWN UINT64_MAX

/* A header field. Names are lower case where the host made them. */
struct sidelane_header {
    /* Field name. */
    sidelane_borrowed_bytes_t name;
    /* Field value, any bytes HTTP allows. */
    sidelane_borrowed_bytes_t value;
};

/* An HTTP request's head. Borrowed until the future that got it is dropped. */
struct sidelane_request_head {
    /* `sizeof(sidelane_request_head_t)`. */
    size_t size;
    /* 10, 11 or 20. */
    uint32_t version;
    /* Bits of SIDELANE_REQUEST_*. */
    uint32_t flags;
    /* Method. */
    sidelane_borrowed_bytes_t method;
    /* `http` or `https`. */
    sidelane_borrowed_bytes_t scheme;
    /* The effective authority (RFC 9112 section 3.2, RFC 9113 section 8.3.1), port included where sent. */
    sidelane_borrowed_bytes_t authority;
    /* Path and query as sent, or `*`. */
    sidelane_borrowed_bytes_t target;
    /* `:protocol` of an extended CONNECT (RFC 8441), else empty. */
    sidelane_borrowed_bytes_t protocol;
    /* Fields, order kept within a name. */
    const sidelane_header_t *headers;
    /* Number of `headers`. */
    size_t headers_len;
};

/* Bits of sidelane_request_head_t.flags. */
/* The request has no body. */
#define SIDELANE_REQUEST_END 1u
/* The client waits for `100 Continue` before it sends the body; `informational(100)` says so.
 * Asking for the body does not: it then yields what a client sends that has waited enough. */
#define SIDELANE_REQUEST_EXPECT_CONTINUE 2u
/* `upgrade` of the responder can hand over the byte stream. */
#define SIDELANE_REQUEST_CAN_UPGRADE 4u

/* A response's head. Borrowed for the call. */
struct sidelane_response_head {
    /* `sizeof(sidelane_response_head_t)`. */
    size_t size;
    /* Status, 200 to 999 (or 101 with an upgrade). */
    uint32_t status;
    /* Bits of SIDELANE_RESPONSE_*. */
    uint32_t flags;
    /* Exact length of the body, or SIDELANE_LENGTH_UNKNOWN. `content-length` among the headers
     * wins. */
    uint64_t body_length;
    /* Fields. */
    const sidelane_header_t *headers;
    /* Number of `headers`. */
    size_t headers_len;
};

/* Bits of sidelane_response_head_t.flags and of the `flags` of
 * sidelane_responder_vt_t.poll_body. */
/* Nothing follows. */
#define SIDELANE_RESPONSE_END 1u

/* A request's body. */
struct sidelane_owned_body {
    /* The host's own. */
    void *data;
    /* The host's functions. */
    const sidelane_body_vt_t *vt;
    /* Exact length, or SIDELANE_LENGTH_UNKNOWN. */
    uint64_t length;
};

/* What sidelane_body_vt_t.poll_frame fills in. */
struct sidelane_frame {
    /* Data, owned by the caller after SIDELANE_BODY_DATA. */
    sidelane_owned_buf_t data;
    /* 1 where no frame follows this one, else 0. */
    uint32_t end;
    /* Trailer fields after SIDELANE_BODY_TRAILERS; borrowed until the next call on this body. */
    const sidelane_header_t *headers;
    /* Number of `headers`. */
    size_t headers_len;
    /* Why, after SIDELANE_POLL_CLOSED. */
    sidelane_reset_t reset;
};

/* Tags of sidelane_body_vt_t.poll_frame, beside SIDELANE_POLL_PENDING and
 * SIDELANE_POLL_CLOSED. */
/* `frame.data` holds a chunk. */
#define SIDELANE_BODY_DATA 1u
/* `frame.headers` holds the trailers; the body has ended. */
#define SIDELANE_BODY_TRAILERS 3u
/* The body has ended. */
#define SIDELANE_BODY_END 4u

/* Functions of a sidelane_owned_body_t. */
struct sidelane_body_vt {
    /* `sizeof(sidelane_body_vt_t)`. */
    size_t size;
    /* Next frame. */
    uint32_t (*poll_frame)(void *data, const sidelane_waker_t *waker, sidelane_frame_t *frame);
    /* Ends interest; the host drains or closes as the protocol wants. */
    void (*drop)(void *data);
};

/* Where a response goes. */
struct sidelane_owned_responder {
    /* The host's own. */
    void *data;
    /* The host's functions. */
    const sidelane_responder_vt_t *vt;
};

/* Functions of a sidelane_owned_responder_t, in the order of use: `informational`*, `head`,
 * `poll_body`*, `finish`. */
struct sidelane_responder_vt {
    /* `sizeof(sidelane_responder_vt_t)`. */
    size_t size;
    /* Sends an interim response (100 to 199 but 101). SIDELANE_POLL_READY, or
     * SIDELANE_POLL_CLOSED where the transport cannot send it or the client is gone. */
    uint32_t (*informational)(
        void *data, uint32_t status, const sidelane_header_t *headers, size_t headers_len);
    /* Sends the head, and with it a first chunk of the body where `first` is not null (moved,
     * also on failure). SIDELANE_POLL_READY, or SIDELANE_POLL_CLOSED. */
    uint32_t (*head)(void *data, const sidelane_response_head_t *head, sidelane_owned_buf_t *first);
    /* Sends a chunk. SIDELANE_POLL_PENDING leaves `chunk` with the caller: backpressure. */
    uint32_t (*poll_body)(
        void *data, const sidelane_waker_t *waker, sidelane_owned_buf_t *chunk, uint32_t flags);
    /* Ends the body, with trailers where `headers_len` is not 0. */
    uint32_t (*finish)(void *data, const sidelane_header_t *headers, size_t headers_len);
    /* Ends the exchange early: a reset on HTTP/2 (with `protocol_code` where given), a closed
     * connection on HTTP/1. Before the head the host answers by `code` instead. */
    void (*abort)(void *data, sidelane_reset_t reset);
    /* SIDELANE_POLL_CLOSED once the client is gone (then `reset` is filled). */
    uint32_t (*poll_closed)(void *data, const sidelane_waker_t *waker, sidelane_reset_t *reset);
    /* After a `head` that accepts an upgrade: resolves to a sidelane_io_outcome_t with the
     * client's bytes. */
    sidelane_owned_future_t (*upgrade)(void *data);
    /* Without `finish` (or END) before: as `abort` with SIDELANE_FAILURE_PLUGIN_FAILED. */
    void (*drop)(void *data);
};

/* `out` of a future that resolves to a sidelane_owned_io_t. */
struct sidelane_io_outcome {
    /* 0: `io` is valid. Else one of SIDELANE_FAILURE_*. */
    uint32_t code;
    /* `errno` where there is one. */
    int32_t err;
    /* The stream, owned by the caller where `code` is 0. */
    sidelane_owned_io_t io;
};

/* One message of an exchange. */
struct sidelane_owned_msg {
    /* Payload field of `TunnelMessage` (`tunnel.proto`): 9 and up, but for
     * SIDELANE_FIELD_DEDICATION; SIDELANE_FIELD_CUSTOM for any bytes. */
    uint32_t field;
    /* Bits of SIDELANE_MSG_*. */
    uint32_t flags;
    /* First part of the encoded payload; empty on receive. */
    sidelane_owned_buf_t head;
    /* Second part of the encoded payload; on receive all of it. */
    sidelane_owned_buf_t body;
};

/* `TunnelMessage.custom`: bytes that only the plugin understands. */
#define SIDELANE_FIELD_CUSTOM 31u

/* `TunnelMessage.dedication`: the hosts' own, between the two calls of
 * sidelane_send_vt_t.dedicate. Since 0.5. */
#define SIDELANE_FIELD_DEDICATION 30u

/* Most bytes of `head` and `body` together in a message of data: 32 KiB of payload and what frames
 * it. A longer message passes, up to SIDELANE_OPEN_BYTES_MAX, and costs as much credit as one of
 * this size; what can be cut should be, so that exchanges take turns. */
#define SIDELANE_MESSAGE_BYTES_MAX ((size_t)33 * 1024)

/* Most bytes of `head` and `body` together in any message: a 64 KiB head, what frames it, and a
 * message's worth of body. An end of an exchange holds at most three and a half windows of the
 * largest messages. */
#define SIDELANE_OPEN_BYTES_MAX ((size_t)112 * 1024)

/* Bits of sidelane_owned_msg_t.flags. */
/* Last message of its direction. */
#define SIDELANE_MSG_END 1u

/* The direction from here to the peer. */
struct sidelane_owned_send_half {
    /* The host's own. */
    void *data;
    /* The host's functions. */
    const sidelane_send_vt_t *vt;
};

/* Functions of a sidelane_owned_send_half_t. */
struct sidelane_send_vt {
    /* `sizeof(sidelane_send_vt_t)`. */
    size_t size;
    /* Queues `message`. SIDELANE_POLL_READY: `head` and `body` are moved.
     * SIDELANE_POLL_PENDING: they stay with the caller (backpressure). SIDELANE_POLL_CLOSED:
     * they stay, the exchange is over. */
    uint32_t (*poll_send)(void *data, const sidelane_waker_t *waker, sidelane_owned_msg_t *message);
    /* Ends the direction (an empty END message) where no message with END was sent. */
    uint32_t (*finish)(void *data);
    /* Ends the whole exchange, both directions, for `reset`'s reason. */
    void (*reset)(void *data, sidelane_reset_t reset);
    /* SIDELANE_POLL_CLOSED once the exchange is over on the wire (then `reset` is filled), without
     * reading; SIDELANE_POLL_PENDING until then. With SIDELANE_FAILURE_NONE it is complete, or the
     * peer has answered and wants no more: nothing has failed, and what was received may still be
     * read. */
    uint32_t (*poll_closed)(void *data, const sidelane_waker_t *waker, sidelane_reset_t *reset);
    /* Sidecar's end: the first byte is about to be written to a service. */
    void (*dispatched)(void *data);
    /* Sidecar's end: nothing was and nothing will be written to a service. Ends the exchange. */
    void (*refused)(void *data, sidelane_reset_t reset);
    /* An unfinished half is reset with SIDELANE_FAILURE_CANCELLED. */
    void (*drop)(void *data);
    /* Moves the exchange to a connection of its own: from here on it is the bytes of `stream`,
     * after those of `ahead` (read of it before), both ways, as they are. Resolves to a
     * sidelane_dedicate_outcome_t: at the end, or at once where the exchange stays as it is. Both
     * ends call it at the same place of what they say, and have taken all messages before it.
     * Neither half is used until it has resolved; dropping the future ends the exchange with the
     * halves. Since 0.5. */
    sidelane_owned_future_t (*dedicate)(
        void *data, sidelane_owned_io_t stream, sidelane_owned_buf_t ahead);
};

/* `out` of sidelane_send_vt_t.dedicate. Since 0.5. */
struct sidelane_dedicate_outcome {
    /* One of SIDELANE_DEDICATED_*. */
    uint32_t how;
    /* After SIDELANE_DEDICATED_ENDED: why; with SIDELANE_FAILURE_NONE all was said. The peer
     * knows. */
    sidelane_reset_t reset;
    /* After SIDELANE_DEDICATED_FRAMED: the stream that was given, owned by the caller. */
    sidelane_owned_io_t io;
    /* Bytes from the stream to the peer. */
    uint64_t sent;
    /* Bytes from the peer to the stream. */
    uint64_t received;
};

/* Values of sidelane_dedicate_outcome_t.how. Since 0.5. */
/* The exchange is over. */
#define SIDELANE_DEDICATED_ENDED 0u
/* There is no connection for it: it goes on in messages, at both ends. */
#define SIDELANE_DEDICATED_FRAMED 1u

/* The direction from the peer to here. */
struct sidelane_owned_recv_half {
    /* The host's own. */
    void *data;
    /* The host's functions. */
    const sidelane_recv_vt_t *vt;
};

/* Tags of sidelane_recv_vt_t.poll_recv, beside SIDELANE_POLL_PENDING. */
/* `message` is filled and owned by the caller. */
#define SIDELANE_RECV_MESSAGE 1u
/* The exchange was reset or lost; `reset` is filled. */
#define SIDELANE_RECV_RESET 2u
/* The direction has ended. */
#define SIDELANE_RECV_FINISHED 3u

/* Functions of a sidelane_owned_recv_half_t. */
struct sidelane_recv_vt {
    /* `sizeof(sidelane_recv_vt_t)`. */
    size_t size;
    /* Next message; taking it returns its credit to the peer. */
    uint32_t (*poll_recv)(
        void *data, const sidelane_waker_t *waker, sidelane_owned_msg_t *message,
        sidelane_reset_t *reset);
    /* An unfinished half is reset with SIDELANE_FAILURE_CANCELLED. */
    void (*drop)(void *data);
};

/* Both directions of an exchange, each on its own. */
struct sidelane_owned_exchange {
    /* From here to the peer. */
    sidelane_owned_send_half_t send;
    /* From the peer to here. */
    sidelane_owned_recv_half_t recv;
};

/* What core knows of an exchange. Borrowed until the future that got it is dropped. */
struct sidelane_meta {
    /* `sizeof(sidelane_meta_t)`. */
    size_t size;
    /* Monotonic deadline on the clock of sidelane_host_vt_t.now; 0: none. */
    uint64_t deadline_ns;
    /* `request_id`: unique in its session. Empty before `open`. */
    sidelane_borrowed_bytes_t request_id;
    /* `protocol_type`. */
    sidelane_borrowed_bytes_t protocol_type;
    /* Route's name. Empty before `open`. */
    sidelane_borrowed_bytes_t route;
    /* Tunnel's name. Empty before `open`. */
    sidelane_borrowed_bytes_t tunnel;
    /* Client's address, `192.0.2.1:4711` or `[2001:db8::1]:4711`. */
    sidelane_borrowed_bytes_t client_address;
    /* The listener's name at the relay. */
    sidelane_borrowed_bytes_t listener;
    /* `http`, `https`, or empty for a byte-born protocol. */
    sidelane_borrowed_bytes_t scheme;
    /* Server name of the TLS handshake, or empty. */
    sidelane_borrowed_bytes_t tls_sni;
    /* Application protocol of the TLS handshake, or empty. */
    sidelane_borrowed_bytes_t tls_alpn;
    /* Subject of the client's certificate, or empty. */
    sidelane_borrowed_bytes_t tls_client;
    /* `traceparent` (W3C), or empty. */
    sidelane_borrowed_bytes_t trace_parent;
    /* The route's `options.<protocol_type>` as JSON, or empty. */
    sidelane_borrowed_bytes_t options;
    /* Where SIDELANE_META_TRUSTED_PROXY is set: the proxy's own address, in the form of
     * `client_address`, or empty where it is not known. Since 0.3. */
    sidelane_borrowed_bytes_t peer_address;
    /* From dispatch to the service's response head, as the route says; 0: the plugin's own, or none.
     * Since 0.3. */
    uint64_t response_head_timeout_ns;
    /* Bits of SIDELANE_META_*. Since 0.3. */
    uint32_t flags;
};

/* Bits of sidelane_meta_t.flags. */
/* The client is a proxy that the relay trusts: what it wrote in `Forwarded` and `X-Forwarded-*` is
 * added to, not replaced. */
#define SIDELANE_META_TRUSTED_PROXY 1u

/* What an exchange is opened for. */
struct sidelane_route_key {
    /* `sizeof(sidelane_route_key_t)`. */
    size_t size;
    /* One of SIDELANE_ROUTE_KEY_*. */
    uint32_t kind;
    /* Host name for SIDELANE_ROUTE_KEY_HOST, port allowed. */
    sidelane_borrowed_bytes_t host;
    /* Path for SIDELANE_ROUTE_KEY_HOST; empty is `/`. */
    sidelane_borrowed_bytes_t path;
};

/* Values of sidelane_route_key_t.kind. */
/* What the listener (or SNI) has fixed. */
#define SIDELANE_ROUTE_KEY_LISTENER 0u
/* By `host` and `path`. */
#define SIDELANE_ROUTE_KEY_HOST 1u

/* What sidelane_opener_vt_t.poll_open fills in. */
struct sidelane_opened {
    /* After SIDELANE_POLL_READY: owned by the caller. */
    sidelane_owned_exchange_t exchange;
    /* After SIDELANE_POLL_READY: borrowed until the plugin's future is dropped. */
    const sidelane_meta_t *meta;
    /* After SIDELANE_POLL_CLOSED: why; its `detail` is borrowed until the opener is dropped. */
    sidelane_failure_t failure;
};

/* Opens the exchange of one client request or connection. */
struct sidelane_owned_opener {
    /* The host's own. */
    void *data;
    /* The host's functions. */
    const sidelane_opener_vt_t *vt;
};

/* Functions of a sidelane_owned_opener_t. */
struct sidelane_opener_vt {
    /* `sizeof(sidelane_opener_vt_t)`. */
    size_t size;
    /* Routes, authorises and opens; SIDELANE_POLL_READY or SIDELANE_POLL_CLOSED fill `out`.
     * Nothing is sent before the first message. Yields one exchange. */
    uint32_t (*poll_open)(
        void *data, const sidelane_waker_t *waker, const sidelane_route_key_t *key,
        sidelane_opened_t *out);
    /* Ends it. */
    void (*drop)(void *data);
};

/* The service behind a tunnel, at the sidecar. */
struct sidelane_owned_service {
    /* The host's own. */
    void *data;
    /* The host's functions. */
    const sidelane_service_vt_t *vt;
    /* Stable for a tunnel's name while the process lives: key of connection pools. */
    uint64_t id;
    /* Changes when the tunnel's settings change: older pooled connections are stale. */
    uint64_t version;
    /* Where it is, `127.0.0.1:3000`; borrowed until the service is dropped. */
    sidelane_borrowed_bytes_t address;
};

/* Functions of a sidelane_owned_service_t. */
struct sidelane_service_vt {
    /* `sizeof(sidelane_service_vt_t)`. */
    size_t size;
    /* Dials; resolves to a sidelane_io_outcome_t. The host bounds it by the connect timeout, TLS
     * included. Where the service is spoken to by TLS, `http/1.1` is offered (ALPN). */
    sidelane_owned_future_t (*connect)(void *data);
    /* Ends it. */
    void (*drop)(void *data);
    /* What the tunnel and the route ask of whoever talks to the service; borrowed until the service
     * is dropped. Never null. Since 0.3. */
    const sidelane_service_settings_t *(*settings)(void *data);
    /* Asks whether this exchange may be sent to the service once more, and takes that from the
     * route's budget. Asked only where the service cannot have processed it, or may twice. 1, or 0:
     * what the client gets is what the last try gave. Since 0.3. */
    uint32_t (*retry)(void *data);
    /* As `connect`, with the application protocols that are offered where the service is spoken to by
     * TLS (RFC 7301), the best first; resolves to a sidelane_alpn_outcome_t. They are borrowed for the
     * call; at most SIDELANE_ALPN_MAX, each of 1 to 255 bytes. None: none is offered. Since 0.4. */
    sidelane_owned_future_t (*connect_alpn)(
        void *data, const sidelane_borrowed_bytes_t *protocols, size_t protocols_len);
};

/* Most protocols that `connect_alpn` takes. Since 0.4. */
#define SIDELANE_ALPN_MAX 8u

/* `out` of sidelane_service_vt_t.connect_alpn. Since 0.4. */
struct sidelane_alpn_outcome {
    /* 0: `io` is valid. Else one of SIDELANE_FAILURE_*. */
    uint32_t code;
    /* `errno` where there is one. */
    int32_t err;
    /* The stream, owned by the caller where `code` is 0. */
    sidelane_owned_io_t io;
    /* Which of the protocols was agreed on, counted from 0; SIDELANE_UNSET: none, since the service is
     * not spoken to by TLS, or knows nothing of ALPN. */
    uint32_t protocol;
};

/* What a tunnel and a route ask of whoever talks to a service. Since 0.3. */
struct sidelane_service_settings {
    /* `sizeof(sidelane_service_settings_t)`. */
    size_t size;
    /* Bits of SIDELANE_SERVICE_*. */
    uint32_t flags;
    /* HTTP's major version to the service: 1, or 2 by prior knowledge, or with SIDELANE_SERVICE_TLS by
     * ALPN. 1 with SIDELANE_SERVICE_BY_ALPN: what the service chooses. */
    uint32_t http_version;
    /* Most times that this exchange may be sent again; 0: the route has no policy, and only what is
     * safe in any case is. */
    uint32_t retries;
    /* Unused connections to keep, per data-path thread; SIDELANE_UNSET: the plugin's own. */
    uint32_t pool_idle;
    /* Connections, used and unused, per data-path thread; SIDELANE_UNSET: the plugin's own. */
    uint32_t pool_connections;
    /* How long an unused connection is kept; SIDELANE_UNSET_NS: the plugin's own. */
    uint64_t pool_idle_timeout_ns;
};

/* Bits of sidelane_service_settings_t.flags. */
/* Each connection tells the service of one client: it serves the exchange that asked for it, and no
 * other. */
#define SIDELANE_SERVICE_UNSHARED 1u
/* The service is spoken to by TLS. Since 0.4. */
#define SIDELANE_SERVICE_TLS 2u
/* The service chooses HTTP's version by ALPN, HTTP/2 before HTTP/1.1; whoever offers HTTP/1.1 alone gets
 * that. Only with SIDELANE_SERVICE_TLS. Since 0.4. */
#define SIDELANE_SERVICE_BY_ALPN 4u

/* A count of sidelane_service_settings_t that says nothing. */
#define SIDELANE_UNSET UINT32_MAX

/* A time of sidelane_service_settings_t that says nothing. */
#define SIDELANE_UNSET_NS UINT64_MAX

/* The services that the host lends a plugin. Valid while the process lives. */
struct sidelane_host {
    /* The host's functions; its own fields follow. */
    const sidelane_host_vt_t *vt;
};

/* Levels of sidelane_host_vt_t.log. */
/* Worth waking someone. */
#define SIDELANE_LEVEL_ERROR 1u
/* Wants attention. */
#define SIDELANE_LEVEL_WARN 2u
/* Connection. */
#define SIDELANE_LEVEL_INFO 3u
/* Branch. */
#define SIDELANE_LEVEL_DEBUG 4u
/* Message. */
#define SIDELANE_LEVEL_TRACE 5u

/* Kinds of sidelane_host_vt_t.metric. */
/* Only grows. */
#define SIDELANE_METRIC_COUNTER 1u
/* Goes up and down. */
#define SIDELANE_METRIC_GAUGE 2u
/* Distribution; the name ends in its unit. */
#define SIDELANE_METRIC_HISTOGRAM 3u

/* Functions of a sidelane_host_t. */
struct sidelane_host_vt {
    /* `sizeof(sidelane_host_vt_t)`. */
    size_t size;
    /* Runs `future` (its `out` is null) on this thread. 1, or 0 outside the host's data-path
     * threads (then it is dropped). */
    uint32_t (*spawn)(const sidelane_host_t *host, sidelane_owned_future_t future);
    /* Monotonic nanoseconds since some point before the plugin was loaded; never 0. */
    uint64_t (*now)(const sidelane_host_t *host);
    /* A timer for `deadline_ns` on that clock. */
    sidelane_owned_timer_t (*timer)(const sidelane_host_t *host, uint64_t deadline_ns);
    /* Dials `address` (`host:port`); resolves to a sidelane_io_outcome_t. `address` is
     * borrowed for the call. */
    sidelane_owned_future_t (*connect)(
        const sidelane_host_t *host, sidelane_borrowed_bytes_t address);
    /* Writes a log line; text is borrowed for the call. */
    void (*log)(
        const sidelane_host_t *host, uint32_t level, sidelane_borrowed_bytes_t target,
        sidelane_borrowed_bytes_t text);
    /* Most verbose SIDELANE_LEVEL_* that is written. */
    uint32_t (*log_level)(const sidelane_host_t *host);
    /* Registers a series of a metric; the same name and labels give the same id. 0: refused
     * (invalid name, other label names than the metric's first series has, too many). The exposed
     * name is `sidelane_plugin_<name>`, with the plugin's name as the label `plugin` before the
     * others. Values come from sets that are bounded (a route's name, never a path); each is cut
     * at 128 bytes. A histogram whose name ends in `_bytes` has buckets from 16 B to 64 MiB, any
     * other from 0.001 to about 4,000 of its unit. */
    uint32_t (*metric)(
        const sidelane_host_t *host, uint32_t kind, sidelane_borrowed_bytes_t name,
        sidelane_borrowed_bytes_t help, const sidelane_header_t *labels, size_t labels_len);
    /* Adds to a counter or gauge, or observes in a histogram. */
    void (*metric_add)(const sidelane_host_t *host, uint32_t id, double value);
    /* Which data-path thread this is, from 0; SIDELANE_NO_SHARD elsewhere. */
    uint32_t (*shard)(const sidelane_host_t *host);
    /* How many there are. */
    uint32_t (*shards)(const sidelane_host_t *host);
    /* Runs `run(data)` on a thread that may block. It is run exactly once. */
    void (*blocking)(const sidelane_host_t *host, void (*run)(void *), void *data);
    /* Joins two byte streams, half-close kept, until both directions have ended; `out` is a
     * sidelane_splice_outcome_t. Streams of the host's own are joined without passing the
     * plugin. */
    sidelane_owned_future_t (*splice)(
        const sidelane_host_t *host, sidelane_owned_io_t a, sidelane_owned_io_t b);
    /* Ends the exchange and resolves to SIDELANE_FAILURE_UNSUPPORTED; sidelane_send_vt_t.dedicate is
     * what moves one to a connection of its own. */
    sidelane_owned_future_t (*dedicate)(
        const sidelane_host_t *host, sidelane_owned_exchange_t exchange);
};

/* sidelane_host_vt_t.shard outside the data-path threads. */
#define SIDELANE_NO_SHARD UINT32_MAX

/* `out` of sidelane_host_vt_t.splice. */
struct sidelane_splice_outcome {
    /* 0, or `errno`. */
    int32_t err;
    /* Bytes from `a` to `b`. */
    uint64_t a_to_b;
    /* Bytes from `b` to `a`. */
    uint64_t b_to_a;
};

/* Where a call that can be refused says why. The host passes it with empty buffers; what the
 * plugin puts there is the host's to drop. */
struct sidelane_error_out {
    /* `sizeof(sidelane_error_out_t)`. */
    size_t size;
    /* One line of text. */
    sidelane_owned_buf_t message;
    /* Dotted path within the block (`pool.idle_timeout`), or empty. */
    sidelane_owned_buf_t path;
};

/* A `protocol_type` that the plugin serves. Static. */
struct sidelane_type_desc {
    /* Its name: upper-case letters, digits and `_`, at most 32 bytes. */
    sidelane_borrowed_bytes_t name;
    /* One of SIDELANE_BORN_*. */
    uint32_t born;
};

/* How exchanges of a type come into being at the relay. */
/* From requests of the HTTP front (`claims`, `accept_http`, `refuse_http`). */
#define SIDELANE_BORN_HTTP 1u
/* From bytes of a listener (`sniff`, `accept_stream`, `refuse_stream`). */
#define SIDELANE_BORN_BYTES 2u

/* Results of sidelane_plugin_vt_t.claims. The highest wins; between equals the type first in
 * name order. */
/* Not mine. */
#define SIDELANE_CLAIM_NO 0u
/* Mine if nobody else wants it. */
#define SIDELANE_CLAIM_FALLBACK 1u
/* Mine. */
#define SIDELANE_CLAIM_YES 2u

/* Results of sidelane_plugin_vt_t.sniff. */
/* Not mine. */
#define SIDELANE_SNIFF_NO 0u
/* Mine. */
#define SIDELANE_SNIFF_YES 1u
/* Cannot say yet. */
#define SIDELANE_SNIFF_NEED_MORE 2u

/* A plugin's functions. `plugin` is what `create` returned; `protocol` is an index into
 * `types`. Functions that return a sidelane_owned_future_t resolve with `out: *mut u32`, one
 * of SIDELANE_FAILURE_* (SIDELANE_FAILURE_NONE: ended well). What such a call borrows is valid
 * until its future is dropped. */
struct sidelane_plugin_vt {
    /* `sizeof(sidelane_plugin_vt_t)`. */
    size_t size;
    /* The protocol types served. */
    const sidelane_type_desc_t *types;
    /* Number of `types`, 1 to 8. */
    size_t types_len;
    /* Makes an instance from the configuration block (JSON text; `null` where the file has
     * none). Null: refused, `error` is filled. */
    void *(*create)(
        const sidelane_host_t *host, sidelane_borrowed_bytes_t config, sidelane_error_out_t *error);
    /* Checks a route's `options.<protocol_type>` (JSON text). 1, or 0 with `error` filled. */
    uint32_t (*validate_route)(
        void *plugin, uint32_t protocol, sidelane_borrowed_bytes_t options,
        sidelane_error_out_t *error);
    /* Pure. One of SIDELANE_CLAIM_*. Null where no type is SIDELANE_BORN_HTTP. */
    uint32_t (*claims)(void *plugin, uint32_t protocol, const sidelane_request_head_t *head);
    /* Pure. One of SIDELANE_SNIFF_*; may point `host` at a part of `bytes`. Null where no type
     * is SIDELANE_BORN_BYTES. */
    uint32_t (*sniff)(
        void *plugin, uint32_t protocol, sidelane_borrowed_bytes_t bytes,
        sidelane_borrowed_bytes_t *host);
    /* Relay's end of an HTTP-born exchange. */
    sidelane_owned_future_t (*accept_http)(
        void *plugin, uint32_t protocol, const sidelane_request_head_t *head,
        const sidelane_meta_t *meta, sidelane_owned_body_t body,
        sidelane_owned_responder_t responder, sidelane_owned_opener_t opener);
    /* Relay's end of a byte-born exchange. */
    sidelane_owned_future_t (*accept_stream)(
        void *plugin, uint32_t protocol, const sidelane_meta_t *meta, sidelane_owned_io_t client,
        sidelane_owned_opener_t opener);
    /* Sidecar's end. */
    sidelane_owned_future_t (*deliver)(
        void *plugin, uint32_t protocol, const sidelane_meta_t *meta,
        sidelane_owned_exchange_t exchange, sidelane_owned_service_t service);
    /* Says `failure` to an HTTP client in the protocol's words. */
    sidelane_owned_future_t (*refuse_http)(
        void *plugin, uint32_t protocol, const sidelane_request_head_t *head,
        sidelane_owned_responder_t responder, const sidelane_failure_t *failure);
    /* Says `failure` on a byte stream in the protocol's words. */
    sidelane_owned_future_t (*refuse_stream)(
        void *plugin, uint32_t protocol, sidelane_owned_io_t client,
        const sidelane_failure_t *failure);
    /* The end of this generation, or of the process, is near: end idle connections, finish what
     * runs. What still runs at `deadline_ns` (on the clock of sidelane_host_vt_t.now) is cut. Few
     * new exchanges come, or none. Each running call is polled once after this returns, so that it
     * may take its leave in its protocol's words. May be called again; the earliest deadline
     * counts. */
    void (*drain)(void *plugin, uint64_t deadline_ns);
    /* Frees the instance. All its futures, exchanges and tasks are gone. */
    void (*destroy)(void *plugin);
};

/* The one symbol that a plugin exports and defines. */
#if defined(__GNUC__)
__attribute__((visibility("default")))
#endif
extern const sidelane_stamp_t sidelane_plugin_stamp;

#ifdef __cplusplus
}
#endif

#endif /* SIDELANE_PLUGIN_H */
