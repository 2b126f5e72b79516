"""Generation across threads: apps load in one and answer in another.

MLX's streams belong to a thread, and work left lazy in one cannot be finished in
another.
"""

import threading

import mlx.core as mx
from small import SmallProcessor

from mm1_mlx.inference.generation import generate, stream_generate
from mm1_mlx.inference.steps import Decoding, generation_stream


def in_thread(work):
    """The result of work() in a thread of its own; its exception is raised here."""
    result: dict = {}

    def run():
        try:
            result["value"] = work()
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the thread hangs"
    if "error" in result:
        raise result["error"]
    return result["value"]


SAMPLED = {
    "max_tokens": 12,
    "temp": 0.7,
    "seed": 4,
    "repetition_penalty": 1.1,
    "prefill_step_size": 5,
}


def test_each_step_may_run_in_another_thread(model, processor):
    prompt = "5 17 33 <image> 8 20"
    expected = generate(model, processor, prompt, [1], **SAMPLED)
    stream = in_thread(
        lambda: stream_generate(model, processor, prompt, [1], **SAMPLED)
    )
    found = []
    for _ in expected.token_ids:
        found += in_thread(lambda: next(stream)).token_ids
    assert tuple(found) == expected.token_ids


def test_a_batch_may_go_on_in_another_thread(model):
    rows = mx.array([[1, 5, 17, 33], [0, 0, 1, 9], [0, 1, 9, 9]])

    def start():
        return Decoding(model, rows, left_padding=[0, 2, 1], max_tokens=8)

    expected, found = start(), in_thread(start)
    for kept in ([0, 1, 2], [2, 0], [0, 1], [1], [0]):
        expected.keep(kept)
        in_thread(lambda kept=kept: found.keep(kept))
        assert in_thread(found.step)[0] == expected.step()[0]


def test_threads_generate_at_the_same_time(model):
    prompts = ["5 17 33", "9", "40 41", "7 7 7"]
    expected = [
        generate(model, SmallProcessor(), p, max_tokens=20).token_ids for p in prompts
    ]
    found: dict = {}

    def work(i):
        answer = generate(model, SmallProcessor(), prompts[i], max_tokens=20)
        found[i] = answer.token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(4)] == expected


def test_generation_does_not_change_the_callers_stream(model, processor):
    before = mx.default_stream(mx.default_device())
    stream = stream_generate(model, processor, "5", max_tokens=4)
    next(stream)
    assert mx.default_stream(mx.default_device()) == before
    stream.close()
    assert generation_stream() is generation_stream()


def test_a_cache_that_is_quantized_on_the_way(model, processor):
    """What one thread has quantized, the next one reads."""
    settings = {"max_tokens": 8, "kv_bits": 8, "quantized_kv_start": 6}
    expected = generate(model, processor, "5 17", **settings)
    stream = stream_generate(model, processor, "5 17", **settings)
    found = []
    for _ in expected.token_ids:
        found += in_thread(lambda: next(stream)).token_ids
    assert tuple(found) == expected.token_ids
