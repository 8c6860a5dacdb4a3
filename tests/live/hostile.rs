//! What other code can do to a handle's socket, and bytes that no kernel sends

use nfqnl::proto::ConfigRequest;
use nfqnl::{CopyMode, Error, Event, Handle, Operation, RecvBatch, Situation, Verdict};
use nfqnl_testkit::netns::isolated;

use crate::lab::{
    Lab, QUEUE, configure_past_the_library, is_silent, next_packet, refusal, udp_payload,
};

/// Whatever has become of the queue in the kernel, which the answer would have told
#[test]
fn a_lost_answer_to_a_binding_leaves_no_key_from_before_that_hits_a_later_packet() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::builder().recv_buffer(1 << 14).open().unwrap();
        let before = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"before");
        let old = next_packet(&handle, &mut batch).key();
        configure_past_the_library(&handle, &ConfigRequest::unbind(QUEUE));
        // Refused each, until the receive buffer has no room for more answers.
        for _ in 0..200 {
            handle.verdict(old, Verdict::Accept).unwrap();
        }
        let error = handle.bind_queue(QUEUE).unwrap_err();
        assert!(
            matches!(
                error,
                Error::NoAck {
                    op: Operation::Bind(QUEUE),
                    ..
                }
            ),
            "{error:?}"
        );
        while !is_silent(&handle, &mut batch) {}
        let set = before.set_mode(CopyMode::PACKET, 0);
        lab.send(b"of a later binding, if there is one");
        while let Some(event) = handle.try_recv(&mut batch).unwrap().next() {
            if let Event::Packet(packet) = event {
                assert_ne!(packet.key(), old, "an earlier packet's key");
            }
        }
        let refused = refusal(set);
        assert_eq!(refused.situation(), Situation::NotBound);

        let _queue = handle.bind_queue(QUEUE).expect("with room for the answer");
        lab.send(b"after");
        let packet = next_packet(&handle, &mut batch);
        assert_eq!(udp_payload(&packet), b"after");
        assert_eq!(
            (packet.id(), packet.key().binding == old.binding),
            (1, false)
        );
        let error = handle.verdict(old, Verdict::Drop).unwrap_err();
        assert!(
            matches!(error, Error::Stale { key, .. } if key == old),
            "{error}"
        );
        handle.verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"after"[..]));
    });
}
