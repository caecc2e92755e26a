"""What connects the runtime to other libraries; nothing here imports them before the user has."""
