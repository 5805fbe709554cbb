"""Messages between the processes of a run."""

import threading
import time

import jax

from xclip_jax.processes import runtime


def test_a_sign_of_life_on_its_way_does_not_undo_that_a_process_is_finished(monkeypatch):
    monkeypatch.setattr(runtime, "_POLL_SECONDS", 0.01)
    values, writing = {}, threading.Event()

    class Client:
        def key_value_set(self, name, value, allow_overwrite):
            if value != runtime._DONE:
                writing.set()
                time.sleep(0.2)
            values[name] = value

        def key_value_dir_get(self, name):
            return []

    watched = runtime.Peers(Client(), 1, 2)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "peers")
    assert writing.wait(10)
    watched.stop()
    thread.join(10)
    assert not thread.is_alive() and list(values.values()) == [runtime._DONE]


def test_the_others_wait_until_process_0_is_finished(monkeypatch):
    monkeypatch.setattr(runtime, "_POLL_SECONDS", 0.01)
    signs = iter([{}, "fails", "alive", "alive", runtime._DONE])

    class Client:
        def key_value_dir_get(self, name):
            if (sign := next(signs)) == "fails":
                raise jax.errors.JaxRuntimeError("UNAVAILABLE: for a moment")
            return [(f"{name}0", sign), (f"{name}1", runtime._DONE)] if sign else []

    for index, left in ((0, 5), (1, 0)):
        waits = object.__new__(runtime.Peers)  # without its thread
        waits.index, waits._client = index, Client()
        waits.await_first()
        remaining = list(signs)
        assert len(remaining) == left
        signs = iter(remaining)
