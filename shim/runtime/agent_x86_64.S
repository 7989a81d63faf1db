/* The exec agent of shim.runtime.agent, x86_64: runs a list of system calls that was planned in Python.
 * fd 3 is the program, mapped at 0x10000000; its first word is the address of the first operation. An operation is eight words: number,
 * six arguments, and a word with kind (byte 0), an errno that is no error (byte 1) and the step for error reports (bytes 2, 3).
 * Kinds: 0 plain, 1 any error is ignored, 2 that one errno is ignored, 4 clone: the parent goes on at the address in the sixth argument,
 * 6 execve of each candidate in the command block at argument 0, 7 *(*argument 0) = argument 1.
 * An error is written to fd 4 as two 32-bit words, step and errno, before exit_group(127).
 * rbx: operation, r12: errno of the candidates so far, r13: kind; none of them is changed by system calls. */
.intel_syntax noprefix
.globl _start
_start:
  mov eax, 9             # mmap(0x10000000, 16 MiB, read and write, private and fixed, 3, 0)
  mov edi, 0x10000000
  mov esi, 0x1000000
  mov edx, 3
  mov r10d, 0x12
  mov r8d, 3
  xor r9d, r9d
  syscall
  cmp rax, rdi
  jne die
  mov rbx, [rax]
  xor r12d, r12d
next:
  movzx r13d, byte ptr [rbx+56]
  cmp r13b, 6
  je candidates
  cmp r13b, 7
  je store
  mov rax, [rbx]
  mov rdi, [rbx+8]
  mov rsi, [rbx+16]
  mov rdx, [rbx+24]
  mov r10, [rbx+32]
  mov r8, [rbx+40]
  mov r9, [rbx+48]
  syscall
  test rax, rax
  js error
  cmp r13b, 4
  jne advance
  test rax, rax
  jz advance
  mov rbx, [rbx+48]
  jmp next
store:
  mov rax, [rbx+8]
  mov rax, [rax]
  mov rcx, [rbx+16]
  mov [rax], rcx
advance:
  add rbx, 64
  jmp next
error:
  neg eax
  cmp r13b, 1
  je advance
  cmp r13b, 2
  jne fail
  cmp al, [rbx+57]
  je advance
fail:
  movzx ecx, word ptr [rbx+58]
  mov edx, 0x10000000
  mov [rdx+8], ecx
  mov [rdx+12], eax
  mov eax, 1             # write(4, report, 8)
  mov edi, 4
  lea rsi, [rdx+8]
  mov edx, 8
  syscall
die:
  mov edi, 127
  mov eax, 231           # exit_group
  syscall
  hlt
candidates:
  mov r14, [rbx+8]
  lea r15, [r14+24]
each:
  mov rdi, [r15]
  test rdi, rdi
  jz none
  add r15, 8
  mov rsi, [r14]
  mov rdx, [r14+8]
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
  jmp none
first:
  test r12d, r12d
  jnz each
keep:
  mov r12d, eax
  jmp each
none:
  mov eax, r12d
  jmp fail
