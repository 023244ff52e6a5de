"""What the script about compiled decisions makes of generated code and of times."""

from __future__ import annotations

import torch

from pitome_vlm import MergeConfig
from scripts.speed import compiled, kernels

CODE = """
cpp_fused_exp_0 = async_compile.cpp_pybinding(['const float*', 'float*'], '''...''')
def call(args):
    buf0 = empty_strided_cpu((1, 4), (4, 1), torch.float32)
    cpp_fused_exp_0(arg0_1, buf0)
    extern_kernels.bmm(buf0, reinterpret_tensor(buf0, (1, 4), (4, 1), 0), out=buf1)
    buf2 = torch.ops.aten.sort.stable(buf1, stable=True, dim=1, descending=True)
    assert_alignment(buf2, 16, 'torch.ops.aten.sort.stable')
    torch.ops.inductor._reinterpret_tensor(buf2, (4,), (1,), 0)
    triton_poi_fused_add_1.run(buf2, 4, stream=stream0)
    return (buf2, )
def benchmark_compiled_module(times=10, repeat=10):
    cpp_fused_exp_0(arg0_1, buf0)
"""


def test_calls_in_generated_code_are_counted():
    assert compiled.launches(CODE) == (2, 2)


def test_the_decisions_of_a_tower_are_noted_and_can_be_made_again():
    model, pixels = kernels.narrow_tower(), torch.zeros(1, 3, 336, 336)
    with torch.no_grad():
        found = compiled.decisions(model, MergeConfig(0.25), pixels)
    assert [one.words for one in found] == ["layer 8, 576 to 363", "layer 14, 363 to 229"]
    plan = found[0].by(compiled.make_plan)
    assert plan.assign.shape == (1, 577)
    assert len(plan.assign.unique()) == 1 + 363


def test_tokens_are_elsewhere_where_they_are_with_others_whatever_groups_are_called():
    plan = torch.tensor([[0, 1, 1, 2, 3]])
    assert compiled.elsewhere(plan, torch.tensor([[3, 0, 0, 1, 2]])) == 0
    assert compiled.elsewhere(plan, torch.tensor([[0, 1, 2, 2, 3]])) == 3


def test_ways_take_turns_and_ratios_are_those_of_a_round():
    order = []
    ways = {
        name: lambda name=name: order.append(name) or len(order) for name in ("plain", "compiled")
    }
    times = compiled.in_turns(ways, 3)
    assert order == ["plain", "compiled", "compiled", "plain"] * 2
    assert times == {"plain": [4, 5, 8], "compiled": [3, 6, 7]}
    slow = {"plain": [2.0, 4.0, 8.0], "compiled": [1.0, 2.0, 4.0]}
    assert compiled.ratio(slow) == [0.5, 0.5, 0.5]
    one = {"decision": "layer 8, 576 to 363", "kernels": 75, "functions": 9, "operators": 8}
    one |= {"loops": 34, "first_call_s": 20.4, "first_call_processor_s": 11.0, "elsewhere": 0}
    case = {"dtype": "float32", "keep": 0.25, "decisions": [one | {"rounds_ms": slow}]}
    text = compiled.markdown([case | {"tower_rounds_ms": slow}])
    row = "| float32 | 0.25 | layer 8, 576 to 363 | 4.00 | 2.00 | 0.50 (0.50 to 0.50) | 75 | 9 + 8 "
    assert f"{row}| 34 | 20 (11) | 0 |" in text
    assert "| float32 | 0.25 | 4 | 2 | 0.500 (0.500 to 0.500) |" in text
