from megadiff import torchvision_ops

torchvision_ops.declare_missing()  # before diffusers, whose pipelines import it
