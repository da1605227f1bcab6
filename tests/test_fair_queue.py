"""Order of a fair queue: clients, shapes, batches."""

from fewstep.serve.fair_queue import FairQueue


def take(queue, limit=1, cost=lambda item: 1.0):
    return queue.take(lambda item: limit, cost)


def fill(queue, *items):
    """Items "client shape number"."""
    for item in items:
        client, shape, *_ = item.split()
        queue.add(item, client, shape)


def test_one_client_is_served_in_order():
    queue = FairQueue()
    fill(queue, "a s 1", "a s 2", "a s 3")
    assert [take(queue) for _ in range(4)] == [["a s 1"], ["a s 2"], ["a s 3"], []]
    assert len(queue) == 0


def test_clients_take_turns_whoever_came_first_with_how_many():
    queue = FairQueue()
    fill(queue, *(f"a s {i}" for i in range(6)), "b s 0", "b s 1")
    assert [take(queue)[0][0] for _ in range(8)] == list("ababaaaa")


def test_large_images_count_more():
    queue = FairQueue()
    fill(queue, *(f"a large {i}" for i in range(3)), *(f"b small {i}" for i in range(8)))
    order = [take(queue, cost=lambda item: 4.0 if "large" in item else 1.0)[0][0] for _ in range(11)]
    assert order == list("abbbbabbbba")


def test_one_shape_does_not_block_another_of_the_same_client():
    queue = FairQueue()
    fill(queue, *(f"a many {i}" for i in range(20)), "a other 0")
    assert take(queue, limit=4) == [f"a many {i}" for i in range(4)]
    assert take(queue, limit=4) == ["a other 0"]


def test_a_batch_has_one_shape_and_is_shared_by_the_clients():
    queue = FairQueue()
    fill(queue, *(f"a s {i}" for i in range(5)), "b other 0", "b s 0", "c s 0")
    batch = take(queue, limit=4)
    assert len(batch) == 4
    assert {item.split()[1] for item in batch} == {"s"}
    assert {item[0] for item in batch} == {"a", "b", "c"}


def test_idleness_earns_no_credit():
    queue = FairQueue()
    fill(queue, *(f"a s {i}" for i in range(40)))
    for _ in range(30):
        take(queue)
    fill(queue, *(f"b s {i}" for i in range(10)))
    order = [take(queue)[0][0] for _ in range(8)]
    assert (order.count("a"), order.count("b")) == (4, 4)
    assert len(queue) == 12


def test_removed_items_are_not_taken():
    queue = FairQueue()
    fill(queue, "a s 1", "a s 2", "b other 1")
    queue.remove(lambda item: item.startswith("a"))
    assert (len(queue), take(queue, 9), take(queue)) == (1, ["b other 1"], [])
    assert queue.items() == []
