"""What each method costs clients and server: measured at laptop size, counted at the paper's sizes.

    python scripts/count_costs.py                   # a minute

At laptop size a client's step is run and counted (`mllmfl_lite/measure/cost.py`). At the paper's sizes nothing is run:
models are built without memory (torch's meta device), and torch's counter adds up what one image or one text takes.
"""

import json
from dataclasses import asdict, replace

import open_clip
import torch
from sweep import RESULTS, RUNS, laptop_run
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mllmfl_lite.data.imagenet_lt import IMAGENET_LT
from mllmfl_lite.data.longtail import long_tail_counts
from mllmfl_lite.federated.fedyoyo import FedYoYo
from mllmfl_lite.measure.cost import client_cost
from mllmfl_lite.models import build_model
from mllmfl_lite.runs import load_federation
from mllmfl_lite.runs.files import read_runs
from mllmfl_lite.runs.parts import initial_model, make_method
from mllmfl_lite.runs.plan import estimate, image_operations
from mllmfl_lite.runs.results import provenance, save_result

METHODS = ("fedavg", "creff", "clip2fl", "fedyoyo", "mllm_llava_fl")
PAPER = {"cifar10_lt_if100": (10, 32, 64, "resnet8"), "cifar100_lt_if100": (100, 32, 64, "resnet8"),
         "imagenet_lt": (1000, 224, 64, "resnet50")}  # fmt: skip
CLIENTS, EPOCHS, REPEATS, IMAGES = 20, 10, 10, 32  # the benchmark's; CReFF's


def laptop():
    """Each method's cost for chapter 6's client, that of median size (all sizes are equal: the one in the middle)."""
    experiment = laptop_run("fedavg", 0).experiment
    train, split, _ = load_federation(experiment)
    typical = sorted(split, key=len)[len(split) // 2]
    found = {}
    for name in METHODS[:-1]:
        method = FedYoYo() if name == "fedyoyo" else make_method(replace(experiment, method=name), train)
        model = initial_model(experiment, train.num_classes, None)
        found[name] = asdict(client_cost(method, model, train, typical, experiment.federated))
    found["mllm_llava_fl"] = found["fedavg"]  # its clients run FedAvg
    return found


def operations(model, *inputs, **named):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs, **named)
    return counter.get_total_flops()


def shapes():
    """Parameters and operations of the real CLIP ViT-B/32 and LLaVA-1.5-7B."""
    with torch.device("meta"):
        tower = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None, device="meta").visual.eval()
        clip = {"parameters": sum(p.numel() for p in tower.parameters()),
                "flops_of_an_image": operations(tower, torch.zeros(1, 3, 224, 224))}  # fmt: skip
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision = CLIPVisionConfig(**sizes, image_size=336, patch_size=14)
        config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064), image_seq_length=576)
        config._attn_implementation = "eager"
        llava = LlavaForConditionalGeneration(config).eval()
        llava_parameters = sum(p.numel() for p in llava.parameters())
        text = torch.zeros(1, 576 + 100, 4096)
        flops = operations(llava.model.language_model, inputs_embeds=text)
        flops += operations(llava.model.vision_tower, torch.zeros(1, 3, 336, 336))
    return {"clip_vit_b_32": clip, "llava_7b": {"parameters": llava_parameters, "flops_of_a_text": flops}}


def paper(clip):
    """A client's round in each benchmark, and the server's parts."""
    found = {}
    for name, (classes, pixels, width, kind) in PAPER.items():
        images = sum(long_tail_counts(classes, 50_000 // classes, 100)) if classes < 1000 else IMAGENET_LT["train"]
        own = images / CLIENTS
        learn, look = image_operations(kind, width, classes, pixels)
        with torch.device("meta"):
            model = build_model(kind, classes, width)
        weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        gradients = 4 * classes * (model.num_features + 1)  # for each class that a client holds
        mends = REPEATS * min(own, IMAGES * classes) * look  # at most
        fedavg = {"bytes_up": weights, "flops": own * EPOCHS * learn}
        creff = {"bytes_up": weights + classes * gradients, "flops": fedavg["flops"] + mends}
        clip2fl = {"bytes_up": creff["bytes_up"], "flops": creff["flops"] + own * clip["flops_of_an_image"]}
        fedyoyo = {"bytes_up": weights + 4 * classes, "flops": 2 * fedavg["flops"] + own * look}
        (run,) = read_runs([RUNS / "paper" / f"{name}.yaml"], [RUNS / "methods" / "mllm_llava_fl.yaml"], [0])
        server = [{"name": s.name, "compact": s.compact, "large": s.large, "steps": s.steps}
                  for s in estimate(run.experiment) if not s.name.startswith("stage 2")]  # fmt: skip
        found[name] = {
            "images_of_a_client": own, "rounds": run.experiment.federated.rounds,
            "clients": {"fedavg": fedavg, "creff": creff, "clip2fl": clip2fl, "fedyoyo": fedyoyo,
                        "mllm_llava_fl": fedavg},
            "server": server,
        }  # fmt: skip
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    real = shapes()
    result = {"label": "costs", "parameters": {"clients": CLIENTS, "epochs": EPOCHS},
              "summary": {"laptop": laptop(), "shapes": real, "paper": paper(real["clip_vit_b_32"])},
              "provenance": provenance("cpu")}  # fmt: skip
    save_result(RESULTS / "laptop" / "leaks" / "costs.json", result)
    print(json.dumps(result["summary"], indent=1))
