"""The page of the study of bf16 against fp32; the study itself takes hours."""

from benchmarks import precision

TEACHER = {"fp32": [56.07, 57.3], "bf16": [57.4, 59.8], "difference_mean": 1.9, "difference_std": 0.8}
FACTS = {"run_on": "imagenette", "hardware": "a processor", "commit": "abc"}
RESULT = {"accuracy": {"teacher": TEACHER}, "options": {"dataset": "imagenette", "size": 64}, **FACTS}


def test_the_page_has_every_accuracy_and_how_it_was_made():
    said = precision.page(RESULT)
    assert "| the teacher's training | 56.1, 57.3 | 57.4, 59.8 | +1.9 ± 0.8 | 1.1 | not seen |" in said
    lower = TEACHER | {"difference_mean": -1.9}
    assert "| -1.9 ± 0.8 | 1.1 | yes |" in precision.page(RESULT | {"accuracy": {"teacher": lower}})
    assert "a processor, commit abc; dataset=imagenette  size=64" in said
