"The pretended GPU refuses what a GPU refuses, and its graphs are graphs."
import pytest
import torch

from . import conftest

gpu = torch.device("cuda", 0)


def numbers(*size, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(gpu, dtype)


def captured(work):
    "A graph of the work, and what the work returned."
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = work()
    return graph, out


def test_devices_do_not_mix():
    x = numbers(3)
    with pytest.raises(RuntimeError, match="same device"): x + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"): torch.stack([x, torch.ones(3)])
    with pytest.raises(RuntimeError, match="generator"): torch.rand(3, device=gpu, generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"): x.numpy()
    assert torch.equal((x + torch.tensor(1.)).cpu(), x.cpu() + 1)


def test_memory_is_limited_and_measured():
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.zeros(2**18, device=gpu)
    assert torch.cuda.memory_allocated() - before == 2**20
    del x
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 2**20
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 2**21) / total)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"): torch.zeros(2**28, device=gpu)


@pytest.mark.pretended
def test_waits_are_counted():
    import pretend_gpu
    x = numbers(4)

    def waits(work) -> list[str]:
        pretend_gpu.counts()
        work()
        return sorted(name for name in pretend_gpu.counts() if name.startswith("wait"))
    assert waits(lambda: x * 2 + x[1:2]) == []
    assert waits(lambda: x[0].item()) == ["wait aten::_local_scalar_dense"]
    assert waits(lambda: x.cpu()) == ["wait copy device to host"]
    assert waits(lambda: torch.ones(3).to(gpu, non_blocking=True)) == []
    mask = x > 0

    def fill(value): x[mask] = value
    def write(value): x[1:3] = value
    def put(value): x[torch.tensor([1], device=gpu)] = value
    assert waits(lambda: x[mask]) == ["wait aten::nonzero"]
    assert waits(lambda: fill(1.)) == waits(lambda: write(1.)) == []
    assert waits(lambda: fill(x[mask])) == ["wait aten::nonzero", "wait mask as index in aten::_index_put_impl_"]
    assert "wait value from the host in aten::_index_put_impl_" in waits(lambda: put(1.))
    assert "wait index from the host in aten::index" in waits(lambda: x[torch.tensor([0, 1])])
    assert waits(lambda: torch.cuda.synchronize()) == ["wait synchronize"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_16_bits_as_float32(dtype):
    if not conftest.PRETENDED and not torch.cuda.is_bf16_supported(False): pytest.skip("this GPU has no bfloat16")
    a, b, c = numbers(3, 4, dtype=dtype), numbers(4, 5, dtype=dtype), numbers(5)
    exact = a.cpu().float() @ b.cpu().float()
    found = torch.mm(a, b, out_dtype=torch.float32)
    assert found.dtype == torch.float32 and torch.allclose(found.cpu(), exact, atol=1e-5)
    assert not torch.equal((a @ b).float().cpu(), exact)
    out = torch.empty(3, 5, device=gpu)
    torch.mm(a, b, out_dtype=torch.float32, out=out)
    assert torch.equal(out, found)
    assert torch.allclose(torch.addmm(c, a, b, out_dtype=torch.float32).cpu(), exact + c.cpu(), atol=1e-5)
    assert torch.allclose(torch.bmm(a[None], b[None], out_dtype=torch.float32)[0].cpu(), exact, atol=1e-5)


def test_softmax_of_16_bits_as_float32():
    x = numbers(3, 40, dtype=torch.float16).requires_grad_()
    out = torch.softmax(x, -1, dtype=torch.float32)
    assert out.dtype == torch.float32 and torch.allclose(out.cpu(), x.detach().cpu().float().softmax(-1), atol=1e-6)
    out[:, 0].sum().backward()
    assert x.grad.dtype == torch.float16 and x.grad.isfinite().all()


def test_a_capture_does_nothing_and_each_replay_does_it():
    x, y = torch.zeros(3, device=gpu), torch.zeros(3, device=gpu)

    def work():
        x.add_(1)
        y.copy_(x * 2)
        return y[1:] + 5
    graph, out = captured(work)
    assert x.tolist() == y.tolist() == [0, 0, 0]
    for i in (1, 2, 3):
        graph.replay()
        assert x.tolist() == [i] * 3 and y.tolist() == [2 * i] * 3 and out.tolist() == [2 * i + 5] * 2
    x.zero_()
    graph.replay()
    assert out.tolist() == [7, 7]


@pytest.mark.pretended
def test_what_was_made_in_a_capture_has_no_value_yet():
    graph, out = captured(lambda: torch.ones(2, device=gpu) + 1)
    assert out.isnan().all()
    graph.replay()
    assert out.tolist() == [2, 2]


def test_what_the_host_knew_is_baked_in():
    x, length, weight = torch.zeros(4, device=gpu), 2, torch.tensor(3.)

    def work(): x[:length].add_(length).mul_(weight)
    graph, _ = captured(work)
    length = 4
    weight.fill_(10)
    graph.replay()
    assert x.tolist() == [6, 6, 0, 0]


def test_an_index_on_the_device_is_read_at_each_replay():
    x, at = torch.zeros(4, device=gpu), torch.zeros(1, dtype=torch.long, device=gpu)

    def work():
        x.index_fill_(0, at, 1)
        at.add_(1)
    graph, _ = captured(work)
    for _ in range(3): graph.replay()
    assert x.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("name", ["item", "nonzero", "mask", "fill_mask", "to_host", "from_host", "data", "list"])
def test_a_capture_waits_for_nothing(name):
    x, mask = torch.zeros(4, device=gpu), torch.ones(4, dtype=torch.bool, device=gpu)
    work = dict(
        item=lambda: x.sum().item(),
        nonzero=lambda: mask.nonzero(),
        mask=lambda: x[mask],
        fill_mask=lambda: x.index_put_((mask,), torch.ones(4, device=gpu)),
        to_host=lambda: x.cpu(),
        from_host=lambda: x.copy_(torch.ones(4)),
        data=lambda: torch.tensor([1., 2.], device=gpu),
        list=lambda: x[[0, 2]],
    )
    with pytest.raises(RuntimeError, match="captur"): captured(work[name])
    assert not torch.cuda.is_current_stream_capturing()
    assert x.tolist() == [0] * 4, "the device works on"


def test_a_capture_under_autocast():
    layer = torch.nn.Linear(4, 4).to(gpu)
    x = numbers(2, 4)

    @torch.no_grad()
    def work():
        with torch.autocast("cuda", torch.float16, cache_enabled=False): return layer(x).float()
    expected = work()
    graph, out = captured(work)
    graph.replay()
    assert torch.equal(out, expected)
    layer.weight.data.mul_(2)
    graph.replay()
    assert not torch.equal(out, expected) and torch.equal(out, work())


def test_a_capture_of_a_training_step():
    def start():
        weight = numbers(4).requires_grad_()
        weight.grad = torch.zeros_like(weight)
        return weight
    weight, again = start(), start()

    def step(w):
        w.grad.zero_()
        (w ** 2).sum().backward()
        with torch.no_grad(): w.sub_(w.grad, alpha=.1)
    step(weight) # Autograd allocates on the first backward pass
    before = weight.detach().clone()
    graph, _ = captured(lambda: step(weight))
    assert torch.equal(weight, before)
    for _ in range(3): graph.replay()
    for _ in range(4): step(again)
    torch.testing.assert_close(weight, again)


def test_streams():
    side = torch.cuda.Stream()
    before = torch.cuda.current_stream()
    side.wait_stream(before)
    with torch.cuda.stream(side): assert torch.cuda.current_stream() == side
    assert torch.cuda.current_stream() == before
    before.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle()):
        assert torch.cuda.is_current_stream_capturing()
    assert not torch.cuda.is_current_stream_capturing()
