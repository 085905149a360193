"""The stack that these tests share; it ends with the last of them."""

from tests.running import mails, own_images, password, received, stack, training

__all__ = ["mails", "own_images", "password", "received", "stack", "training"]
