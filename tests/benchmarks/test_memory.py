import torch

from memo_runtime.rehearsal.cpu_peak import cpu_peak, storage_bytes


def test_the_peak_on_the_cpu_is_that_of_live_tensors():
    def step():
        first = torch.zeros(1000, dtype=torch.float32)
        second = torch.zeros(3000, dtype=torch.float32)
        del first, second
        torch.zeros(2000, dtype=torch.float32)

    assert cpu_peak(step, 500) == 500 + 16_000


def test_shared_storage_counts_once():
    whole = torch.zeros(100)
    assert storage_bytes([whole, whole[:10], torch.zeros(10)]) == 440
