//! The tools of these tests, held against each other without the program.

use sidelane_e2e::client::{Client, request};
use sidelane_e2e::service::Service;

#[test]
fn service_records_what_the_client_sent() {
    let service = Service::ok();
    let bytes = b"POST /a%2f?x HTTP/1.1\r\nHost: h\r\nA: \xfe\r\ncontent-length: 3\r\n\r\nabc";
    let answer = request(service.address(), "POST", bytes);
    assert_eq!((answer.head.status, answer.body.as_slice()), (200, b"ok".as_slice()));
    assert_eq!(service.received(), bytes);
    let request = service.only_request();
    assert_eq!(request.target, b"/a%2f?x");
    assert_eq!(request.all("a").collect::<Vec<_>>(), [b"\xfe"]);
}

#[test]
fn chunks_and_trailers_are_told_apart() {
    let service = Service::answering(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-end: yes\r\n\r\n",
    );
    let mut client = Client::connect(service.address());
    for _ in 0..2 {
        client.send(
            "PUT / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nt: 1\r\n\r\n",
        );
        let answer = client.answer("PUT");
        assert_eq!(answer.body, b"ok");
        assert_eq!(answer.trailers, [(b"x-end".to_vec(), b"yes".to_vec())]);
    }
    assert_eq!(service.requests().len(), 2);
    assert_eq!(service.records().len(), 1);
}
