"""Traffic is counted as the chip has it."""

import pytest

from compiling.traffic import Traffic, traffic

FUSION = """\
HloModule jit_update, is_scheduled=true

%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %neg = f32[8,128]{1,0} negate(%p)
}

ENTRY %main (a: f32[8,128], b: bf16[8,128]) -> (f32[8,128], s4[8,128]) {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="params['(a)']"}
  %b = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %both = (f32[8,128]{1,0}, /*index=1*/s4[8,128]{1,0}) fusion(%a, %b), kind=kLoop
  %first = f32[8,128]{1,0} get-tuple-element(%both), index=0
  %second = s4[8,128]{1,0} get-tuple-element(%both), index=1
  ROOT %out = (f32[8,128]{1,0}, s4[8,128]{1,0}) tuple(%first, %second)
}
"""

ON_CHIP = """\
ENTRY %main (a: f32[256]) -> f32[256] {
  %a = f32[256]{0:T(256)} parameter(0)
  %start = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[256]{0:T(256)S(1)} copy-done(%start)
  %neg = f32[256]{0:T(256)S(1)} negate(%done)
  ROOT %out = f32[256]{0:T(256)} add(%neg, %done)
}
"""

LOOP = """\
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %loop = f32[8]{0} while(%a), condition=%cond, body=%body
}
"""


def test_a_kernel_reads_its_operands_and_writes_its_results():
    assert traffic(FUSION) == Traffic(8 * 128 * (4 + 2) + 8 * 128 * 4 + 8 * 128 // 2, 1)


def test_what_stays_on_chip_is_free_and_copies_to_it_are_reads():
    # The copy reads 1 kB, the last kernel writes 1 kB.
    assert traffic(ON_CHIP) == Traffic(2 * 1024, 2)


def test_loops_are_refused():
    with pytest.raises(ValueError, match="cannot count the traffic of a while"):
        traffic(LOOP)
