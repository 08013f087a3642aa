import time

SMALL = ["--config", "smoke"]


def test_it(world, containers, tmp_path, capfd, monkeypatch):
    from ray_pipeline.cli import main

    t = time.time()
    import threading

    def dump():
        while True:
            time.sleep(3)
            with open("/tmp/world.txt", "w") as f:
                f.write(world.text_of())
                f.write(str(world.unknown))
                f.write(str([(c.id, c.output is not None) for c in world.calls.values()]))

    threading.Thread(target=dump, daemon=True).start()
    code = main(
        [
            "run",
            "--backend",
            "modal",
            "--gpu-type",
            "CPU",
            "--gpus",
            "1",
            "--output-dir",
            str(tmp_path / "runs"),
            "--run-name",
            "toy",
            "--no-wandb",
            *SMALL,
        ]
    )
    with capfd.disabled():
        print("CODE", code, time.time() - t)
        o = capfd.readouterr()
        print(o.out[-5000:])
        print(o.err[-3000:])
        print(world.unknown)
    world.text_of() and print(world.text_of()[-3000:])
    assert code == 9
