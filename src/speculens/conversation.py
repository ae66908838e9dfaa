from dataclasses import dataclass
from PIL.Image import Image
@dataclass(frozen=True)
class Message:
    role: str
    content: tuple
@dataclass(frozen=True)
class Conversation:
    messages: tuple
    @property
    def images(self):
        return tuple(p for m in self.messages for p in m.content if not isinstance(p, str))
    def to_chat(self):
        return [{"role": m.role, "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in m.content]} for m in self.messages]
