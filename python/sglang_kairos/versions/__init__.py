"""SGLang versions: fetch one, check one, patch one, add one."""
