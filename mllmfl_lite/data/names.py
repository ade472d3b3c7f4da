"""Class names: CIFAR's, and how they are said in a sentence."""

# CIFAR-100's superclasses, as a noun each, with their fine classes (Krizhevsky, 2009)
SUPERCLASSES = {
    "sea mammal": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flower": "orchid poppy rose sunflower tulip",
    "container": "bottle bowl can cup plate",
    "fruit": "apple mushroom orange pear sweet_pepper",
    "household device": "clock keyboard lamp telephone television",
    "piece of furniture": "bed chair couch table wardrobe",
    "insect": "bee beetle butterfly caterpillar cockroach",
    "predator": "bear leopard lion tiger wolf",
    "building": "bridge castle house road skyscraper",
    "landscape": "cloud forest mountain plain sea",
    "large animal": "camel cattle chimpanzee elephant kangaroo",
    "wild mammal": "fox porcupine possum raccoon skunk",
    "invertebrate": "crab lobster snail spider worm",
    "person": "baby boy girl man woman",
    "reptile": "crocodile dinosaur lizard snake turtle",
    "small mammal": "hamster mouse rabbit shrew squirrel",
    "tree": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicle": "bicycle bus motorcycle pickup_truck train",
    "machine": "lawn_mower rocket streetcar tank tractor",
}
SUPERCLASS_OF = {fine: noun for noun, members in SUPERCLASSES.items() for fine in members.split()}
SPOKEN = {"orange": "orange fruit", "plain": "grassy plain", "can": "tin can"}  # whose names mean something else, too
SYNONYMS = {"airplane": "plane", "automobile": "car", "ship": "boat"}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = tuple(sorted(SUPERCLASS_OF))


def with_article(noun: str) -> str:
    """``"an airplane"``, ``"a cat"``."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def spoken(name: str) -> str:
    """A class name as it is said: ``"pickup_truck"`` is "pickup truck"."""
    return SPOKEN.get(name, name.replace("_", " "))
