//! Both ends, with the test as the tunnel between them.

use sidelane_plugin::failure;
use sidelane_testkit::{AcceptHttp, Deliver, Kit, Outcome, TestRequest, TestService};

use crate::{kit, meta, read_head, values};

/// Carries what waits at both ends; true: something did.
async fn carry(accepted: &AcceptHttp, delivered: &Deliver) -> bool {
    let mut moved = false;
    for (from, to) in [(&accepted.peer, &delivered.peer), (&delivered.peer, &accepted.peer)] {
        while from.waiting() > 0 {
            let message = from.message().await;
            to.send(message.field, message.payload, message.end);
            moved = true;
        }
    }
    moved
}

/// Carries until nothing waits at either end.
async fn settle(kit: &Kit, accepted: &AcceptHttp, delivered: &Deliver) {
    loop {
        kit.run_until_idle();
        if !carry(accepted, delivered).await {
            return;
        }
    }
}

#[test]
fn a_request_goes_there_and_back() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let request = TestRequest::new("POST", "/a?b")
            .header("content-type", "text/plain")
            .with_body(Some(5))
            .version(20);
        let accepted = kit.accept_http(&request);
        let delivered = kit.deliver(&meta(), &service);
        accepted.body.send("he");
        settle(&kit, &accepted, &delivered).await;
        let mut stream = service.accept().await;
        let head = read_head(&mut stream).await;
        assert_eq!(values(&head, "content-length"), ["5"]);
        assert_eq!(values(&head, "via"), ["2.0 sidelane"]);
        accepted.body.send_last("llo");
        settle(&kit, &accepted, &delivered).await;
        assert_eq!(stream.read(5).await, b"hello");
        stream
            .write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n2\r\nok\r\n")
            .await;
        settle(&kit, &accepted, &delivered).await;
        assert_eq!(accepted.response.head().await.unwrap().status, 200);
        stream.write(b"0\r\nx-sum: 2\r\n\r\n").await;
        settle(&kit, &accepted, &delivered).await;
        let whole = accepted.response.whole().await.unwrap();
        assert_eq!((&whole.body[..], whole.trailers.len()), (&b"ok"[..], 1));
        let well = Outcome::Ended(failure::NONE);
        assert_eq!(accepted.running.outcome().await, well);
        assert_eq!(delivered.running.outcome().await, well);
    });
}

#[test]
fn large_bodies_arrive_unchanged_both_ways() {
    const SIZES: [usize; 8] = [1, 32 * 1024, 32 * 1024 + 1, 7, 100_000, 65_536, 50_000, 3];
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let length: usize = SIZES.iter().sum();
        let request = TestRequest::new("PUT", "/").with_body(Some(length as u64));
        let accepted = kit.accept_http(&request);
        let delivered = kit.deliver(&meta(), &service);
        settle(&kit, &accepted, &delivered).await;
        let mut stream = service.accept().await;
        read_head(&mut stream).await;
        let mut next = 0u8;
        let mut chunk = |size: usize| -> Vec<u8> {
            std::iter::repeat_with(|| {
                next = next.wrapping_mul(5).wrapping_add(3);
                next
            })
            .take(size)
            .collect()
        };
        for size in SIZES {
            let bytes = chunk(size);
            accepted.body.send(bytes.clone());
            settle(&kit, &accepted, &delivered).await;
            assert!(stream.read(size).await == bytes, "chunk of {size}");
        }
        accepted.body.end();
        settle(&kit, &accepted, &delivered).await;

        stream
            .write(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").as_bytes())
            .await;
        settle(&kit, &accepted, &delivered).await;
        assert_eq!(accepted.response.head().await.unwrap().body_length, Some(length as u64));
        for size in SIZES {
            let bytes = chunk(size);
            stream.write(&bytes).await;
            let mut received = Vec::new();
            while received.len() < size {
                settle(&kit, &accepted, &delivered).await;
                received.extend(accepted.response.chunk().await.unwrap().unwrap());
            }
            assert!(received == bytes, "chunk of {size}");
        }
        settle(&kit, &accepted, &delivered).await;
        assert_eq!(accepted.running.outcome().await, Outcome::Ended(failure::NONE));
        assert_eq!(delivered.running.outcome().await, Outcome::Ended(failure::NONE));
    });
}

#[test]
fn continue_is_the_services_to_say() {
    for refused in [false, true] {
        let (kit, service) = (kit(), TestService::default());
        kit.block_on(async {
            let request = TestRequest::new("PUT", "/").with_body(Some(3)).expecting_continue();
            let accepted = kit.accept_http(&request);
            let delivered = kit.deliver(&meta(), &service);
            settle(&kit, &accepted, &delivered).await;
            let mut stream = service.accept().await;
            assert_eq!(values(&read_head(&mut stream).await, "expect"), ["100-continue"]);
            if refused {
                stream.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno").await;
                settle(&kit, &accepted, &delivered).await;
                assert_eq!(accepted.response.whole().await.unwrap().head.status, 403);
                return;
            }
            stream.write(b"HTTP/1.1 100 Continue\r\n\r\n").await;
            settle(&kit, &accepted, &delivered).await;
            assert_eq!(accepted.response.informational().await.status, 100);
            accepted.body.send_last("abc");
            settle(&kit, &accepted, &delivered).await;
            assert_eq!(stream.read(3).await, b"abc");
            stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
            settle(&kit, &accepted, &delivered).await;
            assert_eq!(accepted.response.whole().await.unwrap().head.status, 200);
        });
    }
}

#[test]
fn a_lost_client_ends_the_services_request() {
    let (kit, service) = (kit(), TestService::default());
    kit.block_on(async {
        let accepted = kit.accept_http(&TestRequest::new("GET", "/"));
        let delivered = kit.deliver(&meta(), &service);
        settle(&kit, &accepted, &delivered).await;
        let mut stream = service.accept().await;
        read_head(&mut stream).await;
        accepted.response.disconnect();
        accepted.running.outcome().await;
        delivered.peer.reset(accepted.peer.was_reset().unwrap());
        stream.closed().await;
        assert_eq!(delivered.running.outcome().await, Outcome::Ended(failure::CLIENT_GONE));
    });
}
