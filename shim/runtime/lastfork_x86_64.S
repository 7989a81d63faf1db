/* The child's half of shim.runtime.lastfork, x86_64. Assembled into lastfork.py; a test compares.
 * One argument, a block of 64-bit words: clone flags, address for the pid, address of an int for the status, argv, envp, filter program
 * or 0, filter flags, 1 for a controlling terminal, paths to try, 0. Returns what clone returned. The child has no stack, so nothing
 * is pushed; it ends in execve or exit_group(127) with step << 16 | errno in the status.
 * r9, r8, r10 and r12 are not changed by system calls. */
.intel_syntax noprefix
.globl launch
launch:
  mov r9, rdi
  mov rdi, [r9]
  xor esi, esi
  mov rdx, [r9+8]
  xor r10d, r10d
  xor r8d, r8d
  mov eax, 56
  syscall
  test rax, rax
  jz child
  ret
child:
  mov r8, [r9+16]        # status
  mov eax, 112           # setsid
  syscall
  mov edx, 0x10000
  test rax, rax
  js fail
  cmp qword ptr [r9+56], 0
  je filter
  mov eax, 16            # ioctl TIOCSCTTY
  xor edi, edi
  mov esi, 0x540e
  xor edx, edx
  syscall
  mov edx, 0x20000
  test rax, rax
  js fail
filter:
  mov rdx, [r9+40]
  test rdx, rdx
  jz programs
  mov eax, 317           # seccomp
  mov edi, 1
  mov rsi, [r9+48]
  syscall
  mov edx, 0x30000
  test rax, rax
  js fail
programs:
  lea r10, [r9+64]
  xor r12d, r12d         # the errno to report
next:
  mov rdi, [r10]
  test rdi, rdi
  jz out
  add r10, 8
  mov rsi, [r9+24]
  mov rdx, [r9+32]
  mov eax, 59            # execve
  syscall
  neg eax
  cmp eax, 13            # EACCES: the best reason so far
  je keep
  cmp eax, 2             # ENOENT
  je first
  cmp eax, 20            # ENOTDIR
  je first
  mov r12d, eax
  jmp out
first:
  test r12d, r12d
  jnz next
keep:
  mov r12d, eax
  jmp next
fail:
  neg eax
  or eax, edx
  mov r12d, eax
out:
  mov [r8], r12d
  mov edi, 127
  mov eax, 231           # exit_group
  syscall
  hlt
