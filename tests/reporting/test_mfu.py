import pytest

from memo_runtime.reporting.mfu import PEAKS, model_flops, peak_flops, utilization


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H800", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
    ],
)
def test_peaks_of_known_devices(name, tflops):
    assert peak_flops(name).flops == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "Tesla V100-SXM2-16GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
    ],
)
def test_unknown_devices_have_no_peak(name):
    assert peak_flops(name) is None
    assert utilization(1e12, 1.0, name) is None


def test_every_peak_has_a_source():
    assert all(peak.source and peak.flops > 0 for peak in PEAKS)


def test_model_flops_of_a_known_geometry():
    # Llama-8B at 8,192 tokens: 6.98e9 in the layers, 0.525e9 in the head.
    parameters = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336) + 4096 * 128256
    flops = model_flops(parameters=parameters, layers=32, attention_width=4096, tokens=8192)
    assert flops == 6 * 7_504_658_432 * 8192 + 6 * 32 * 4096 * 8192**2


def test_sequences_and_full_attention_count():
    shape = {"parameters": 10, "layers": 2, "attention_width": 3, "tokens": 5}
    assert model_flops(**shape) == 6 * 10 * 5 + 6 * 2 * 3 * 25
    assert model_flops(**shape, sequences=4) == 4 * model_flops(**shape)
    assert model_flops(**shape, causal=False) == 6 * 10 * 5 + 12 * 2 * 3 * 25


def test_utilization_is_a_share_of_all_devices():
    assert utilization(989.4e12, 2.0, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)
    assert utilization(989.4e12, 1.0, "NVIDIA H100 80GB HBM3", devices=4) == pytest.approx(0.25)
    assert utilization(1.0, 0.0, "NVIDIA H100 80GB HBM3") is None
