"""Workers on a cluster of two nodes: what they draw, and what happens when they are lost."""

import os

import faults
import pytest
import torch

from postgrad.errors import PostgradError
from postgrad.models.language import load_policy
from postgrad.notices import heard_by
from postgrad.sampling.cluster import ClusterEngine, ClusterSettings
from postgrad.sampling.generation import SamplingSettings, draw_here, generate, wanted

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

SAMPLING = SamplingSettings(24)
WORKERS = 3


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny")


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orders") / "orders"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def crew(cluster, policy, orders):
    settings = ClusterSettings(WORKERS, chunk=4)
    engine = ClusterEngine(policy, settings, faults.obedient(orders))
    yield engine
    engine.close()


def asked(policy):
    prompts = [policy.render(f"{i} and {i * i} are") for i in range(6)]
    return wanted(policy, prompts, SAMPLING, samples=4, seeds=range(24))


def alike(some, others):
    """Whether responses are the same to the bit."""
    return all(
        torch.equal(one.tokens, other.tokens)
        and torch.equal(one.logprobs, other.logprobs)
        and one.finished == other.finished
        for one, other in zip(some, others, strict=True)
    )


@pytest.fixture(scope="module")
def expected(policy):
    """What a policy in this process draws, a prompt at a time as the workers do."""
    whole = asked(policy)
    return [
        one for start in range(0, 24, 4) for one in draw_here(policy, whole.part(start, start + 4))
    ]


def test_a_prompt_s_responses_stay_together_and_small_groups_share_a_chunk(policy):
    from postgrad.sampling.cluster import _cuts

    prompts = [torch.tensor([i]) for i in (0, 0, 0, 1, 2, 2, 3)]
    assert _cuts(prompts, 2) == [(0, 3), (3, 6), (6, 7)]
    assert _cuts(prompts, 100) == [(0, 7)]


def test_weights_that_changed_are_pushed_once_and_drawn_by(crew, policy, expected):
    crew.metrics()
    whole = asked(policy)
    assert alike(crew.ask(policy, whole).drawn(), expected)
    assert alike(crew.ask(policy, whole).drawn(), expected)
    assert crew.metrics()["rollout/pushes"] == 1
    before = crew.ask(policy, whole)
    old = [p.detach().clone() for p in policy.parameters()]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    after = crew.ask(policy, whole).drawn()
    changed = [
        one for start in range(0, 24, 4) for one in draw_here(policy, whole.part(start, start + 4))
    ]
    assert not alike(changed, expected)
    assert alike(after, changed)
    assert alike(before.drawn(), expected)  # by the weights at the time of asking
    with torch.no_grad():
        for parameter, value in zip(policy.parameters(), old, strict=True):
            parameter.copy_(value)
    measured = crew.metrics()
    assert measured["rollout/pushes"] == 1
    assert measured["rollout/workers"] == WORKERS
    assert 0 < measured["throughput/workers_busy"] <= 1
    assert measured["throughput/worker_tokens_per_second"] > 0


def test_generate_gives_the_tokens_of_this_process(crew, policy):
    prompts = [policy.render(text) for text in ("one", "two or more", "three")]
    here = generate(policy, prompts, SAMPLING, samples=5, seeds=range(15))
    policy.engine = crew
    try:
        there = generate(policy, prompts, SAMPLING, samples=5, seeds=range(15))
    finally:
        policy.engine = None
    assert there.texts == here.texts
    assert torch.equal(there.finished, here.finished)
    for one, other in zip(there.logprobs, here.logprobs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lost", [1, WORKERS], ids=["one", "all"])
def test_what_a_killed_worker_was_drawing_is_drawn_by_another(crew, policy, orders, expected, lost):
    crew.metrics()
    faults.order(orders, "kill", lost)
    assert alike(crew.ask(policy, asked(policy)).drawn(), expected)
    assert not any(orders.iterdir())
    assert crew.metrics()["rollout/restarts"] == lost
    # those that took their place draw too
    assert alike(crew.ask(policy, asked(policy)).drawn(), expected)


def test_a_worker_that_raises_is_replaced(crew, policy, orders, expected):
    crew.metrics()
    faults.order(orders, "raise")
    assert alike(crew.ask(policy, asked(policy)).drawn(), expected)
    assert crew.metrics()["rollout/restarts"] == 1


def test_a_mistake_of_the_user_is_not_tried_again(crew, policy, orders, expected):
    faults.order(orders, "object")
    with pytest.raises(PostgradError, match=r"^the model's memory is taken$"):
        crew.ask(policy, asked(policy)).drawn()
    assert alike(crew.ask(policy, asked(policy)).drawn(), expected)


def test_responses_that_no_worker_can_draw_stop_in_one_line(crew, policy, orders):
    whole = asked(policy).part(0, 4)
    faults.order(orders, "raise", 3)
    with pytest.raises(PostgradError) as caught:
        crew.ask(policy, whole).drawn()
    assert str(caught.value) == (
        "rollout.workers: 4 responses could not be drawn, 3 times over: RuntimeError: an illegal "
        "memory access"
    )


def test_a_node_is_lost_while_its_worker_draws(crew, cluster, policy, orders, expected):
    pipe = orders.parent / "staying"
    os.mkfifo(pipe)
    faults.order(orders, f"stay.{cluster.second.node_id}")
    under_way = crew.ask(policy, asked(policy))
    with pipe.open() as waiting:  # until that worker draws
        waiting.readline()
    cluster.remove_node(cluster.second, allow_graceful=False)
    assert alike(under_way.drawn(), expected)
    measured = crew.metrics()
    assert measured["rollout/workers"] == WORKERS - 1
    assert alike(crew.ask(policy, asked(policy)).drawn(), expected)


def test_the_number_of_workers_makes_no_difference(crew, cluster, policy, expected):
    crew.close()
    for workers in (1, 2):
        engine = ClusterEngine(policy, ClusterSettings(workers, chunk=4))
        try:
            assert alike(engine.ask(policy, asked(policy)).drawn(), expected)
        finally:
            engine.close()
    with pytest.raises(PostgradError, match=r"^rollout.workers: the engine is closed$"):
        engine.ask(policy, asked(policy))


def test_a_cluster_without_room_is_refused(cluster, policy):
    with pytest.raises(PostgradError, match=r"^rollout.workers: 40 workers need 40 CPUs, and the"):
        ClusterEngine(policy, ClusterSettings(40, patience=0.1))


def test_nodes_that_come_up_later_are_waited_for(cluster, policy):
    lines, added = [], []

    def hear(line):
        lines.append(line)
        added.append(cluster.add_node(num_cpus=8, object_store_memory=100 * 2**20))

    with heard_by(hear):
        engine = ClusterEngine(policy, ClusterSettings(10, patience=100))
    try:
        (line,) = lines
        assert line.endswith("has 3: waiting for nodes at most 100 s (rollout.worker_patience)")
    finally:
        engine.close()
        cluster.remove_node(added[0])
