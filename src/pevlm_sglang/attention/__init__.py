"""What SGLang's attention backend does on a server with PEVLM."""
