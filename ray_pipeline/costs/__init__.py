"""What a layout costs, from settings alone: parameters, memory, communication and time. Nothing here runs a model.

`measure` is the exception: it counts the bytes of a real step, to hold the prediction against. It alone knows torch.
"""
