from tests.runs import tiny_run


def test_a_validation_stands_under_its_own_step(tmp_path, capsys):
    """Also the last one; and no line of training repeats one of before."""
    tiny_run(tmp_path, "trainer.max_steps=5", "trainer.val_check_interval=2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    validations = [line.split()[1] for line in lines if "val_loss" in line]
    assert validations == ["2/5", "4/5", "5/5"]
    training = [line for line in lines if "val_loss" not in line]
    assert [line.split()[1] for line in training] == [f"{step}/5" for step in range(1, 6)]
    assert all("token_acc" in line and "val_" not in line for line in training)
