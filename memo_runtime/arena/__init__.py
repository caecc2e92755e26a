"""From a step to addresses to the planned allocator: recording, planning, checking, enabling."""
